"""Shared fixtures: a command-line runner, and where CIFAR-10 lies."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import ROOT

os.environ.setdefault("WANDB_MODE", "offline")
_home = tempfile.TemporaryDirectory(prefix="dpopt-home-")  # keys and caches of the tests, not the user's
os.environ["DPOPT_HOME"] = _home.name
if not torch.cuda.is_available():  # read when a kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python run.py ARGUMENTS` with its runs below tmp_path; returns the completed process."""

    def run(*arguments: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        where = [] if any(a.startswith("output_dir=") for a in arguments) else [f"output_dir={tmp_path}/runs"]
        command = [sys.executable, str(ROOT / "run.py"), *arguments, *where]
        env = {**os.environ, **environment}
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, timeout=timeout, env=env, stdin=subprocess.DEVNULL
        )

    return run


@pytest.fixture(scope="session")
def cifar_dir() -> Path:
    """Where torchvision finds CIFAR-10."""
    folder = Path(os.environ.get("DPOPT_DATA_DIR", ROOT / "data"))
    if not (folder / "cifar-10-batches-py").is_dir():
        pytest.skip(f"no CIFAR-10 in {folder}: set DPOPT_DATA_DIR")
    return folder
