"""Shared fixtures: the command line in this process and in another, and where CIFAR-10 lies."""

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import absl.logging
import pytest
import torch
from helpers import ROOT

from dpopt.cli import main

os.environ.setdefault("WANDB_MODE", "offline")
_home = tempfile.TemporaryDirectory(prefix="dpopt-home-")  # keys and caches of the tests, not the user's
os.environ["DPOPT_HOME"] = _home.name
if not torch.cuda.is_available():  # read when a kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Hydra shuts all log handlers down, and absl's, which dp-accounting brings, then closes pytest's file for stderr.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__


@pytest.fixture
def command(tmp_path, monkeypatch, capsys) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Call `dpopt VERB ARGUMENTS` in this process, in tmp_path and with its runs below it."""

    def call(verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        where = _below(tmp_path, arguments) if verb in ("train", "estimate") else []
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["run.py"])
        # Hydra shuts all handlers down, and absl's closes its stream, which may be pytest's.
        monkeypatch.setattr(logging, "shutdown", lambda *_: None)
        handlers, level = logging.root.handlers[:], logging.root.level  # Hydra sets its own
        capsys.readouterr()
        try:
            code = main([verb, *arguments, *where])
        except SystemExit as error:  # Hydra's and argparse's
            code = error.code or 0
        finally:
            logging.root.handlers[:], logging.root.level = handlers, level
        seen = capsys.readouterr()
        return subprocess.CompletedProcess([verb, *arguments], code, seen.out, seen.err)

    return call


def _below(folder: Path, arguments: tuple[str, ...]) -> list[str]:
    given = any(word.startswith("output_dir=") or word == "-sc" for word in arguments)
    return [] if given else [f"output_dir={folder}/runs"]


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python run.py ARGUMENTS` in another process, where the process is the point."""

    def run(*arguments: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "run.py"), *arguments, *_below(tmp_path, arguments)]
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
