"""Run directories: their files, the lock that one process holds, and the secret key of an unfinished run.

A run directory holds config.yaml, metrics.csv, checkpoint.pt, result.json, model.safetensors, the privacy card as
Markdown and as HTML, and while a run with secure randomness is unfinished its key. Files appear whole or not at all.
"""

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dpopt import files
from dpopt.config.schema import Config
from dpopt.rng import RandomKey

RESULT, CHECKPOINT, METRICS, CONFIG = "result.json", "checkpoint.pt", "metrics.csv", "config.yaml"
CARD, WEIGHTS, KEY, ERROR, LOCK = "privacy_card.md", "model.safetensors", "secret.key", "error.txt", ".lock"
AUDIT, ROC = "audit.json", "audit.png"  # of an audited run
CARD_PAGE, PREPROCESSING = "privacy_card.html", "preprocessing.json"  # the latter of an export


def finished(directory: Path) -> dict[str, Any] | None:
    """Read the result of a run that has completed, else None."""
    path = directory / RESULT
    result = files.read_json(path) if path.exists() else {}
    return result if result.get("status") == "finished" else None


def read_config(directory: Path) -> Config:
    """Read the configuration that a run has recorded.

    Raises:
        ValueError: when there is none.
    """
    path = directory / CONFIG
    if not path.exists():
        raise ValueError(f"{directory} holds no {CONFIG}: name the directory of a run")
    return Config.from_stored(yaml.safe_load(path.read_text()))


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Make the directory and hold it against other processes.

    Raises:
        ValueError: when another process holds it.
    """
    with files.writing(directory / LOCK):
        directory.mkdir(parents=True, exist_ok=True)
        held = open(directory / LOCK, "w")  # noqa: SIM115 (closed below)
    with held as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"another process is training in {directory}: wait for it, or add tag=NAME for a run of your own"
            ) from None
        yield


def clear(directory: Path) -> None:
    """Delete a run's files, except its lock and tracker files."""
    erase_key(directory)
    for name in (RESULT, CHECKPOINT, METRICS, CONFIG, CARD, CARD_PAGE, WEIGHTS, ERROR, AUDIT, ROC):
        (directory / name).unlink(missing_ok=True)


def secret_key(directory: Path) -> RandomKey:
    """Read the run's secret key, or make it for a new run.

    The file is readable by the owner alone, and kept until the run is finished.

    Raises:
        ValueError: when it is damaged, or lost although the run has begun.
    """
    path = directory / KEY
    if not path.exists():
        if (directory / CHECKPOINT).exists():
            raise ValueError(
                f"{path} is lost, so the draws of this run cannot be repeated: start again with fresh=true"
            )
        temporary = path.with_name(f".{path.name}.tmp")
        with files.writing(path):
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(secrets.token_bytes(32))
            files.replace_durably(temporary, path)
    material = path.read_bytes()
    if len(material) != 32 or not any(material):
        raise ValueError(f"{path} is damaged, so the run cannot continue: start again with fresh=true")
    return RandomKey(material, secure=True)


def erase_key(directory: Path) -> None:
    """Overwrite and remove the run's secret key, if it has one."""
    path = directory / KEY
    if path.exists():
        with files.writing(path):
            with open(path, "r+b") as file:  # in place, not into a new file
                file.write(bytes(path.stat().st_size))
                file.flush()
                os.fsync(file.fileno())
            path.unlink()


def note_failure(note: Path, error: Exception) -> None:
    """Record, for the tables of a sweep, why a run that has no directory could not begin."""
    with contextlib.suppress(OSError):  # never mask the original error
        note.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(note, f"{error}\n")


def failure(directory: Path, note: Path) -> str | None:
    """Read the first line of what ended the run in a directory, or kept it from beginning; None when nothing did."""
    for path in [directory / ERROR, *([] if directory.exists() else [note])]:
        if path.exists():
            return path.read_text().splitlines()[0]
    return None
