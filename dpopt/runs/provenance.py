"""Where a result comes from: the commit of the code, the versions of libraries, the device."""

import ast
import hashlib
import importlib.util
import platform
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dpopt.machine import processor

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, if it is one
PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = [Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
_INSTALLED.append(Path(site.getusersitepackages()).resolve())
_LIBRARIES = {*sys.stdlib_module_names, "dpopt", "torch"} - {"__main__"}
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
    digests, seen = [_digest(file) for file in (*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.[ch]"))], set()
    names = [name.rpartition(".")[0] for name in named]
    while names:
        name = names.pop()
        if not name or name in seen or name.partition(".")[0] in _LIBRARIES:
            continue
        seen.add(name)
        names.append(name.rpartition(".")[0])  # a package runs before what is in it
        module = sys.modules.get(name)
        file = Path(getattr(module, "__file__", None) or _found(name)).resolve()
        if file.suffix == ".py" and file.is_file() and not any(map(file.is_relative_to, _INSTALLED)):
            digests.append(_digest(file, module))
            names += _imports(file, name if file.name == "__init__.py" else name.rpartition(".")[0])
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


@cache  # of the code that is loaded, though the file may change
def _digest(file: Path, module: ModuleType | None = None) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _found(name: str) -> str:
    """Find the file of a module that is not loaded, without loading its package: one that a function would import."""
    package = name.rpartition(".")[0]
    try:
        spec = None if package and package not in sys.modules else importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return ""
    return (spec and spec.origin) or ""


def _imports(file: Path, package: str) -> Iterator[str]:
    """Name everything that a file may import, in functions, too."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


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
