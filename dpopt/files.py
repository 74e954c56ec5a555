"""Files that are whole or not there, and work that one process does for all."""

import fcntl
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one sentence which file could not be written, and why.

    Raises:
        OSError: whatever torch or safetensors raise on a full disk.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise OSError(
            f"{path} cannot be written ({reason}): make room or set its permissions; the same command then continues"
        ) from error


def write_atomic(path: Path, content: str) -> None:
    """Write a text file so that a crash leaves either the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        with open(temporary, "w") as file:
            file.write(content)
        replace_durably(temporary, path)


def replace_durably(temporary: Path, path: Path) -> None:
    """Move a finished file into place; on the disk before this returns."""
    for target in (temporary, path.parent):
        if target == path.parent:
            os.replace(temporary, path)
        handle = os.open(target, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def to_json(values: Any, indent: int | None = None) -> str:
    """Write JSON; numbers that are not finite become "Infinity", "-Infinity" and "NaN", as in protobuf's JSON."""
    return json.dumps(_finite(values), indent=indent, allow_nan=False)


def from_json(text: str) -> Any:
    """Read JSON of `to_json`; also the bare Infinity and NaN of earlier versions.

    Raises:
        ValueError: for text that is no JSON.
    """
    return _with_numbers(json.loads(text))


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_atomic(path, to_json(values, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an unreadable file counts as empty."""
    try:
        values = from_json(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _with_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """Other processes that want to fill this folder wait here; it is made, and goes again if nothing came into it."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
        if made:
            with suppress(OSError):  # it holds something
                folder.rmdir()
