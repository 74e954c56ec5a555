"""Where a result comes from: the commit of the code, the versions of libraries, the device."""

import hashlib
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch

from dpopt.machine import processor

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, if it is one
PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = [Path(path).resolve() for path in sysconfig.get_paths().values()]
_CODE = ("dpopt", "conf", "run.py")  # what can change a result; README, tests and results cannot


def short_commit(commit: Any) -> str:
    """Shorten a commit for people."""
    name, dash, dirty = str(commit).partition("-")
    return name[:12] + dash + dirty


@cache  # the code that is loaded, though the checkout may move on during a sweep
def git_commit() -> str | None:
    """Name the commit of dpopt's own checkout, with "-dirty" where code or configuration differ from it.

    An installed package has no checkout, even if it lies inside of another project's.
    """
    try:
        _git("ls-files", "--error-unmatch", *_CODE)
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return None
        return _git("rev-parse", "HEAD") + ("-dirty" if _git("status", "--porcelain", "--", *_CODE) else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def code_hash(named: Iterable[str]) -> str:
    """Hash the source of dpopt, of the modules of these functions and classes, and of those that these import.

    Installed packages are left out.
    """
    files, seen = {*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.c")}, set()
    names = [name.rpartition(".")[0] for name in named]
    while names:
        module = sys.modules.get(names.pop())
        file = Path(getattr(module, "__file__", None) or "")
        if module is None or module in seen or not file.is_file() or any(map(file.is_relative_to, _INSTALLED)):
            continue
        seen.add(module)
        files.add(file)
        for value in list(vars(module).values()):
            if isinstance(value, ModuleType):
                names.append(value.__name__)
            else:
                names.append(
                    str(getattr(value if isinstance(value, type | FunctionType) else type(value), "__module__", ""))
                )
    digests = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _git(*words: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def versions() -> dict[str, str]:
    """List the versions that decide what is computed."""
    libraries = {name: version(name) for name in ("torch", "opacus", "dp-accounting")}
    return {"python": platform.python_version()} | libraries


def device_name(device: torch.device) -> str:
    """Name a device as people do."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({processor()})"
