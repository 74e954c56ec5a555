"""Every write of a run fails once: one sentence, and the same command goes on to the same bits."""

import builtins
import errno
import os
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import configure
from safetensors import SafetensorError
from spawned import run_at_ranks
from training.test_distributed import assert_same_state, checkpoint

from dpopt.runs import directory
from dpopt.training import checkpoint as writer
from dpopt.training.run import run
from dpopt.training.trainer import Trainer

pytestmark = pytest.mark.slow
WORDS = (
    *("experiment=quickstart", "optimizer=dp_adam", "steps=4", "checkpoint_every=2", "eval_every=2", "logger=csv"),
    *("micro_batch=64", "engine=store"),
    *("accountant=rdp", "epsilon=null", "noise_multiplier=1"),  # σ is given: runs start sooner
)


class Watched:
    """A file that may take half of what is written, and then find the disk full."""

    def __init__(self, file, fails):
        self.file, self.fails = file, fails

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        if self.fails():
            self.file.write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(content)


class Faults:
    """Counts the writes below some folders, by kind and file, and lets one of them fail.

    Args:
        folders: whose files are watched.
        failing: (kind, file, number): which write fails.
    """

    def __init__(self, patch, folders: list[Path], failing: tuple[str, str, int] | None = None) -> None:
        self.folders, self.failing, self.seen = folders, failing, Counter()
        self.open, self.fsync, self.replace = builtins.open, os.fsync, os.replace
        patch.setattr(builtins, "open", self.opened)
        patch.setattr(os, "fsync", self.synced)
        patch.setattr(os, "replace", self.replaced)
        patch.setattr(writer.torch, "save", self.saved(torch.save, RuntimeError("PytorchStreamWriter failed writing")))
        full = SafetensorError("Error while serializing: No space left on device")
        patch.setattr(writer, "save_file", self.saved(writer.save_file, full))

    def fails(self, kind: str, path) -> bool:
        if not any(Path(path).is_relative_to(folder) for folder in self.folders) or Path(path).is_dir():
            return False
        name = Path(path).name.removeprefix(".").removesuffix(".tmp")
        self.seen[kind, name] += 1
        return (kind, name, self.seen[kind, name]) == self.failing

    def opened(self, file, mode="r", *arguments, **options):
        path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else file
        if not set(mode) & set("wa+") or not isinstance(path, str | Path):
            return self.open(file, mode, *arguments, **options)
        if self.fails("open", path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return Watched(self.open(file, mode, *arguments, **options), lambda: self.fails("write", path))

    def synced(self, handle):
        if self.fails("fsync", os.readlink(f"/proc/self/fd/{handle}")):
            raise OSError(errno.EIO, "Input/output error")
        self.fsync(handle)

    def replaced(self, source, target):
        if self.fails("replace", target):
            raise OSError(errno.ENOSPC, "No space left on device")
        self.replace(source, target)

    def saved(self, real, error):
        def save(value, path):
            if self.fails("write", path):
                Path(path).write_bytes(b"half")
                raise error
            real(value, path)

        return save


def prepare(patch, folder: Path, failing=None) -> Faults:
    """Let a write of this process fail; its runs have a key that is the same each time."""
    patch.setattr("dpopt.training.cost._PROBE_SECONDS", 0.0)  # nobody reads the estimate
    patch.setenv("DPOPT_HOME", str(folder / "home"))
    patch.setattr(directory, "secrets", SimpleNamespace(token_bytes=lambda size: bytes(range(size))))
    return Faults(patch, [folder / "runs", folder / "home"], failing)


def train(patch, folder: Path, failing=None) -> Faults:
    """Run; count steps in `faults.steps`."""
    patch.setattr(Trainer, "train_step", lambda *a, real=Trainer.train_step: (steps.append(1), real(*a))[1])
    steps: list[int] = []
    faults = prepare(patch, folder, failing)
    faults.steps, faults.error = steps, None
    try:
        faults.status = run(configure(*WORDS, f"output_dir={folder}/runs"))["status"]
    except OSError as error:
        faults.error = str(error)
    return faults


def test_every_write_fails_once(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        clean = train(patch, tmp_path / "clean")
    assert clean.status == "finished"
    names = {name for _, name in clean.seen}
    wanted = {"checkpoint.pt", "metrics.csv", "result.json", "privacy_card.md", "model.safetensors", "secret.key"}
    assert wanted | {"config.yaml", "ledger.jsonl", ".lock".removeprefix(".")} <= names
    several = ("checkpoint.pt", "metrics.csv")  # written again and again: the first and the last time
    failing = [
        (*what, number)
        for what, count in clean.seen.items()
        for number in ({1, count} if what[1] in several else {1})
        if not what[1].startswith("fingerprint")  # of the user, not of the run
    ]
    assert len(failing) > 25
    for number, fault in enumerate(failing):
        folder = tmp_path / str(number)
        with monkeypatch.context() as patch:
            broken = train(patch, folder, fault)
        assert broken.error and "\n" not in broken.error and ": " in broken.error, (fault, broken.error)
        assert "cannot be" in broken.error, (fault, broken.error)
        kept = checkpoint(folder / "runs")["step"] if list(folder.glob("runs/*/checkpoint.pt")) else 0
        assert kept >= len(broken.steps) - 2, fault
        with monkeypatch.context() as patch:
            again = train(patch, folder)
        assert again.error is None and again.status == "finished", (fault, again.error)
        assert_same_state(tmp_path / "clean/runs", folder / "runs")
        assert not list(folder.glob("runs/*/secret.key")), fault


def hurt(folder: Path, failing, rank: int) -> None:
    """Let a write of a rank fail; all files are those of rank 0."""
    prepare(pytest.MonkeyPatch(), folder, failing if rank == 0 else None)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The run over two ranks, without a fault."""
    folder = tmp_path_factory.mktemp("two_ranks")
    words = (*WORDS, f"output_dir={folder}/runs")
    assert run_at_ranks(2, *words, hurt=partial(hurt, folder, None)) == ["finished"] * 2
    return folder


@pytest.mark.parametrize(
    "failing",
    [
        *(("write", "secret.key", 1), ("write", "checkpoint.pt", 3), ("fsync", "checkpoint.pt", 3)),
        *(("write", "metrics.csv", 2), ("replace", "model.safetensors", 1), ("open", "result.json", 1)),
    ],
    ids=lambda failing: " ".join(map(str, failing)),
)
def test_a_write_fails_and_the_other_rank_stops(failing, two_ranks, tmp_path):
    words = (*WORDS, f"output_dir={tmp_path}/runs")
    first, second = run_at_ranks(2, *words, hurt=partial(hurt, tmp_path, failing))
    assert first.startswith("OSError: ") and "cannot be written" in first and "\n" not in first
    sentence = first.removeprefix("OSError: ")
    assert second.startswith("RankLost: rank 0 on ") and second.endswith(f"has stopped: {sentence}")
    kept = checkpoint(tmp_path / "runs")["step"] if list(tmp_path.glob("runs/*/checkpoint.pt")) else 0
    late = failing[1] in ("model.safetensors", "result.json")
    assert kept == (4 if late else 2 if failing[1] == "checkpoint.pt" else kept)
    assert run_at_ranks(2, *words, hurt=partial(hurt, tmp_path, None)) == ["finished"] * 2
    assert_same_state(two_ranks / "runs", tmp_path / "runs")
    assert not list(tmp_path.glob("runs/*/secret.key")) and not list(tmp_path.glob("runs/*/.*.tmp"))
