"""Where a result comes from: the commit of the code, the versions of libraries, the device."""

import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dpopt.machine import processor


def short_commit(commit: Any) -> str:
    """Shorten a commit for people."""
    name, dash, dirty = str(commit).partition("-")
    return name[:12] + dash + dirty


@cache  # the code that is loaded, though the checkout may move on during a sweep
def git_commit() -> str | None:
    """The commit of the checkout that this code runs from, if it is one; with "-dirty" where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    """List the versions that decide what is computed."""
    libraries = {name: version(name) for name in ("torch", "opacus", "dp-accounting")}
    return {"python": platform.python_version()} | libraries


def device_name(device: torch.device) -> str:
    """Name a device as people do."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({processor()})"
