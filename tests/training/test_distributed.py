"""A run on several ranks: its files, its end, and what happens when a rank is killed."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ROOT, configure
from spawned import run_at_ranks

from dpopt import files
from dpopt.runs import directory
from dpopt.runs.identity import locate
from dpopt.training import distributed
from dpopt.training.run import run
from dpopt.training.trainer import Trainer

pytestmark = pytest.mark.slow
SMALL = (
    *("experiment=quickstart", "optimizer=dp_adam", "steps=6", "checkpoint_every=2", "eval_every=6", "logger=csv"),
    *("randomness=research", "precision=fp64", "micro_batch=32"),
)


def checkpoint(folder: Path) -> dict:
    (path,) = folder.glob("*/checkpoint.pt")
    return torch.load(path, weights_only=True)


def tensors(value, path="") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {name: t for key, item in items for name, t in tensors(item, f"{path}/{key}").items()}


def assert_same_state(one: Path, other: Path) -> None:
    first, second = checkpoint(one), checkpoint(other)
    a, b = tensors(first["parts"]), tensors(second["parts"])
    assert first["step"] == second["step"] and len(a) > 8 and a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert run(configure(*SMALL, f"output_dir={folder}"))["status"] == "finished"
    return folder


def test_a_run_goes_on_with_another_number_of_ranks(alone, tmp_path):
    words = (*SMALL, f"output_dir={tmp_path}")
    assert run(configure(*words, "time_limit=0"))["steps"] == 1
    assert run_at_ranks(3, *words, "time_limit=0") == ["time_limit"] * 3
    assert checkpoint(tmp_path)["step"] == 3  # ranks agree to stop within the next step
    assert run_at_ranks(2, *words) == ["finished"] * 2
    assert_same_state(alone, tmp_path)
    assert locate(configure(*words)).is_dir()  # one name, whatever the world
    for name in (directory.METRICS, directory.CARD, directory.CONFIG, directory.WEIGHTS, directory.RESULT):
        assert (locate(configure(*words)) / name).exists()
    assert run_at_ranks(2, *words) == ["finished"] * 2  # says so, and trains nothing


def test_an_audited_run_with_filter_and_adaptive_clip_has_the_same_state(tmp_path):
    words = (*SMALL, "filter=kalman", "clipping=adaptive", "audit=32", "diagnostics=true", "holdout=0.1")
    run(configure(*words, f"output_dir={tmp_path}/one"))
    assert run_at_ranks(2, *words, f"output_dir={tmp_path}/two") == ["finished"] * 2
    assert_same_state(tmp_path / "one", tmp_path / "two")


def kill(when: str, victim: int, rank: int) -> None:
    """Let a rank kill itself at a moment of its run."""
    if rank != victim:
        return

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    if when == "start":
        Trainer.__init__ = die
    elif when == "step":
        real = Trainer.train_step
        Trainer.train_step = lambda self, batch: die() if batch.step == 3 else real(self, batch)
    else:  # the file is written, but not in its place
        replace = files.replace_durably
        name = {"checkpoint": directory.CHECKPOINT, "result": directory.RESULT}[when]
        moves = []

        def replace_or_die(temporary, path):
            moves.append(path.name)
            if moves.count(name) == (2 if when == "checkpoint" else 1):
                die()
            replace(temporary, path)

        files.replace_durably = replace_or_die
        from dpopt.training import checkpoint as writer

        writer.replace_durably = replace_or_die


@pytest.mark.parametrize(
    "when, victim", [("start", 1), ("step", 0), ("step", 2), ("checkpoint", 0), ("result", 0)], ids=str
)
def test_the_others_stop_when_a_rank_is_killed(when, victim, alone, tmp_path):
    words = (*SMALL, f"output_dir={tmp_path}")
    began = time.monotonic()
    told = run_at_ranks(max(2, victim + 1), *words, hurt=partial(kill, when, victim))
    assert time.monotonic() - began < 30
    for rank, sentence in enumerate(told):
        if rank == victim:
            assert sentence == "killed"
        else:
            assert sentence.startswith(f"RankLost: rank {victim} on ") and sentence.endswith("was killed or is lost")
    assert not list(tmp_path.glob("*/result.json"))
    assert run_at_ranks(2, *words) == ["finished"] * 2
    assert_same_state(alone, tmp_path)


def fail(rank: int) -> None:
    def train_step(self, batch):
        raise ValueError("this rank has no luck: give it some")

    if rank == 1:
        Trainer.train_step = train_step


def test_the_others_say_why_a_rank_has_stopped(tmp_path):
    first, second = run_at_ranks(2, *SMALL, f"output_dir={tmp_path}", hurt=fail)
    assert second == "ValueError: this rank has no luck: give it some"
    assert first.startswith("RankLost: rank 1 on ") and first.endswith(
        "has stopped: this rank has no luck: give it some"
    )
    (note,) = tmp_path.glob("*/error.txt")
    assert "this rank has no luck" in note.read_text()


def drift(rank: int) -> None:
    def train_step(self, batch, real=Trainer.train_step):
        real(self, batch)
        if rank == 1 and batch.step == 2:
            with torch.no_grad():
                next(self.model.parameters()).add_(1e-12)

    Trainer.train_step = train_step


def test_ranks_that_drift_apart_write_no_checkpoint(tmp_path):
    told = run_at_ranks(2, *SMALL, f"output_dir={tmp_path}", hurt=drift)
    assert told[0].startswith("ValueError: the weights of rank 1 are no longer those of rank 0")
    assert told[1] in (told[0], "SystemExit: 1")  # rank 0 has said it
    assert checkpoint(tmp_path)["step"] == 2


def test_the_secret_key_is_that_of_rank_0_and_goes_with_the_result(tmp_path):
    words = [*SMALL, f"output_dir={tmp_path}", "randomness=secret"]
    assert run_at_ranks(2, *words, "time_limit=0") == ["time_limit"] * 2
    (key,) = tmp_path.glob("*/secret.key")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert run_at_ranks(2, *words) == ["finished"] * 2 and not key.exists()
    assert len(list(tmp_path.iterdir())) == 1


def test_ranks_with_different_commands_are_refused(tmp_path):
    told = run_at_ranks(2, *SMALL, f"output_dir={tmp_path}", hurt=another_batch_size)
    assert any("rank 1 has another configuration than rank 0" in sentence for sentence in told)
    assert not list(tmp_path.iterdir())


def another_batch_size(rank: int) -> None:
    import spawned

    real = spawned.configure
    if rank == 1:
        spawned.configure = lambda *words: real(*words, "batch_size=32")


def torchrun(folder: Path, line: str, *more: str) -> subprocess.CompletedProcess[str]:
    launcher, ranks, script, *words = line.split()
    assert (launcher, script) == ("torchrun", "run.py")
    command = (sys.executable, "-m", "torch.distributed.run", ranks, str(ROOT / script), *words, *more)
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment())


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_torchrun_as_typed(tmp_path):
    (line,) = [line.split("#")[0] for line in (ROOT / "README.md").read_text().splitlines() if "torchrun" in line]
    done = torchrun(tmp_path, line, "steps=3", "logger=csv")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("result") == 1 and "on cpu, 2 ranks" in done.stdout  # the panel of rank 0
    assert len(list(tmp_path.glob("runs/*/result.json"))) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]
    sweep = torchrun(tmp_path, line, "-m", "epsilon=1,8")
    assert sweep.returncode != 0 and sweep.stderr.count("-m sweeps over several runs: drop one of the two") == 1


SLOW = """
import os, sys, time
import dpopt.cli.train as cli
if os.environ["RANK"] == "0":
    time.sleep(4)
sys.exit(cli.train(sys.argv[1:]))
"""


def test_rank_0_is_heard_though_it_is_slow(tmp_path):
    """It says what is wrong with the words before torchrun ends it because another rank has ended."""
    (tmp_path / "slow.py").write_text(SLOW)
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "slow.py")
    done = subprocess.run((*command, "epslon=3"), cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.returncode != 0 and done.stderr.count("epslon is no key") == 1, done.stderr


def is_free(path: Path) -> bool:
    try:
        with directory.lock(path):
            return True
    except ValueError:
        return False


def test_ranks_end_with_torchrun(tmp_path):
    words = (*SMALL, "steps=3000", "checkpoint_every=1", f"output_dir={tmp_path}/runs")
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    with open(tmp_path / "told", "w") as told:
        launcher = subprocess.Popen(
            (*command, str(ROOT / "run.py"), *words), env=environment(), stderr=told, stdout=told
        )
    while launcher.poll() is None and not list(tmp_path.glob("runs/*/checkpoint.pt")):
        time.sleep(0.1)
    assert launcher.poll() is None, (tmp_path / "told").read_text()
    launcher.kill()
    launcher.wait()
    until = time.monotonic() + 30
    (path,) = tmp_path.glob("runs/*")
    while (text := (tmp_path / "told").read_text()).count("was killed") < 2 and time.monotonic() < until:
        time.sleep(0.1)
    # Each rank says why it ends; the second may notice the first before it notices torchrun.
    assert "dpopt: torchrun, which started rank " in text and text.count("was killed") >= 2
    while not is_free(path) and time.monotonic() < until:
        time.sleep(0.1)
    assert is_free(path) and checkpoint(tmp_path / "runs")["step"] < 3000


def test_a_rank_without_torchrun_does_not_wait_for_it(monkeypatch):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for name, value in (group | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "_ANSWER", timedelta(seconds=1))
    with (
        pytest.raises(
            OSError, match=r"^the other ranks cannot be found at localhost:\d+, torchrun may have been killed"
        ),
        distributed.process_group("cpu"),
    ):
        pass
