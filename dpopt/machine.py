"""This machine: its processor, and the folder for what is kept to save time."""

import functools
import importlib.util
import os
import platform
from pathlib import Path

import torch
from torch import Tensor


def processor() -> str:
    """Name this machine's processor; where that is not known, its architecture."""
    lines = processor_features().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


@functools.cache
def processor_features() -> str:
    """Read what the system says of a processor core, without its current speed."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.exists() else [platform.node()]
    return "\n".join(line for line in lines if "MHz" not in line and "bogomips" not in line)


@functools.cache
def have_triton() -> bool:
    """Tell whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; to a GPU without waiting for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def cache_folder() -> Path:
    """Make and return the user's cache folder, `$XDG_CACHE_HOME/dpopt`."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpopt"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
