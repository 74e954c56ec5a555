"""Kill runs at random moments, over one and two ranks, and compare what comes out with a run that nobody disturbed.

    python scripts/soak.py                      # 200 kills, one to two hours on two cores
    python scripts/soak.py 20 --seed 3

A rank or torchrun is killed by SIGKILL. Within 30 seconds every process of the run must be gone; where a rank was
killed, somebody must have named it. The same command follows, until the run has finished: then its weights, checkpoint,
metrics, result, card and ledger must be those of the undisturbed run, bit by bit, and nothing else may be left.
"""

import argparse
import contextlib
import csv
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from dpopt import files
from dpopt.runs import directory
from dpopt.runs.identity import locate
from dpopt.runs.ledger import Ledger
from dpopt.tables import spec

WORDS = (
    *("experiment=quickstart", "precision=fp64", "micro_batch=32", "steps=24", "checkpoint_every=1", "eval_every=8"),
    *("logger=csv", "accountant=rdp", "epsilon=null", "noise_multiplier=1"),  # σ is given: commands start sooner
)
MOMENTS = ("setup", "step", "checkpoint write", "export")
GRACE, LIMIT = 30.0, 300.0  # seconds for the others to end after a kill; for a command that is left alone
MEASURED = ("time/", "memory/peak", "wall_seconds", "examples_per_second", "peak_memory_bytes")  # differ each time
OF_USER = ("config", "git_commit")  # `config` names the folder


class Run:
    """A run in its folder, with keys that are the same for all.

    Args:
        folder: for the run's directory and the user's files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.log = folder, folder / "home", folder / "log.txt"
        (job,) = spec.expand((*WORDS, f"output_dir={folder}/runs"), "experiment", "soak")
        self.directory = locate(job.config)
        self.directory.mkdir(parents=True)
        self.home.mkdir()
        for key in (self.directory / directory.KEY, self.home / "fingerprint.key"):
            key.touch(mode=0o600)
            key.write_bytes(bytes(range(32)))
        self.began = 0.0

    def start(self, ranks: int) -> subprocess.Popen[bytes]:
        """Start the command that trains, or continues, the run."""
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={_free_port()}"]
        command += [str(spec.ROOT / "run.py"), *WORDS, f"output_dir={self.folder}/runs"]
        env = os.environ | {"DPOPT_HOME": str(self.home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(spec.ROOT)}
        self.began = time.time() - 0.02  # the clock of files is coarse
        with open(self.log, "wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=self.folder)

    def moment(self) -> str:
        """Tell from the files what the command that was started last is doing."""
        if not self._wrote(directory.CONFIG):
            return "setup"
        if self._wrote(f".{directory.WEIGHTS}.tmp", directory.WEIGHTS):
            return "export"
        return "checkpoint write" if self._wrote(f".{directory.CHECKPOINT}.tmp") else "step"

    def _wrote(self, *names: str) -> bool:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                if (self.directory / name).stat().st_mtime >= self.began:
                    return True
        return False

    def last_words(self) -> str:
        """Return the end of what the last command printed."""
        return self.log.read_text(errors="replace")[-1500:]


def processes(launched: subprocess.Popen[bytes], ranks: int) -> dict[str, int]:
    """List the process ids of a command, by role; ranks may not be there yet."""
    if ranks == 1:
        return {"rank 0": launched.pid}
    found = {"torchrun": launched.pid}
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
        for child in children:
            about = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            found |= {f"rank {v[5:].decode()}": int(child) for v in about if v.startswith(b"RANK=")}
    return found


def alive(process: int) -> bool:
    """Tell whether a process runs; one that has ended but was not collected does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for_moment(
    run: Run, launched: subprocess.Popen[bytes], wanted: str, draws: random.Random, lasts: float
) -> bool:
    """Wait until a run is at a random moment of a kind; False when it ended before.

    Args:
        run: whose files tell.
        launched: its command.
        wanted: the kind.
        draws: where in it.
        lasts: seconds that the kind lasts in an undisturbed run.
    """
    kinds = MOMENTS[MOMENTS.index(wanted) :]
    began: float | None = None
    delay = draws.uniform(0, lasts / 2)  # most runs have done half of it before they were killed
    while launched.poll() is None:
        at, now = run.moment(), time.monotonic()
        if began is None and (at in kinds or (at == "step" and wanted == "checkpoint write")):
            began = now
        # The file of a checkpoint is there for milliseconds: after the delay, wait for it.
        if began is not None and now - began >= delay and (wanted != "checkpoint write" or at in kinds):
            return True
        time.sleep(0.0005 if began is not None else 0.01)
    return False


class Soak:
    """Kills, one after the other, and what they have shown.

    Args:
        folder: for all runs; those that failed are kept.
        draws: makes all choices.
    """

    def __init__(self, folder: Path, draws: random.Random) -> None:
        self.folder, self.draws = folder, draws
        self.kills: Counter[tuple[str, str]] = Counter()
        self.failures: list[str] = []
        self.longest = 0.0  # seconds until the others had ended
        self.finished = 0
        self.wanted = self._undisturbed()

    def _undisturbed(self) -> Run:
        run = Run(self.folder / "undisturbed")
        launched = run.start(1)
        seen: dict[str, float] = {}
        while launched.poll() is None:
            seen.setdefault(run.moment(), time.monotonic())
            time.sleep(0.001)
        if launched.returncode:
            raise RuntimeError(f"the run fails without any kill:\n{run.last_words()}")
        end = time.monotonic()
        first = end - (time.time() - run.began)
        self.lasts = {"setup": seen["step"] - first, "step": end - seen["step"], "export": end - seen["export"]}
        self.lasts["checkpoint write"] = seen["export"] - seen["step"]
        return run

    def go(self, kills: int) -> None:
        """Kill so many times, then let the last run finish."""
        run = None
        number = 0
        while self.kills.total() < kills or run is not None:
            if run is None:
                number += 1
                run = Run(self.folder / f"run{number}")
            if self.attempt(run, self.kills.total() < kills):
                run = None

    def attempt(self, run: Run, kill: bool) -> bool:
        """Run the command once, and kill it on the way; True when the run is over."""
        ranks = self.draws.choice((1, 2, 2))
        wanted = self.draws.choices(MOMENTS, (2, 4, 2, 2))[0]
        launched = run.start(ranks)
        if not (kill and wait_for_moment(run, launched, wanted, self.draws, self.lasts[wanted])):
            return self._end(run, launched, ranks)
        roles = processes(launched, ranks)
        victim = self.draws.choice(sorted(roles))
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(roles[victim], signal.SIGSTOP)
        at = run.moment()
        with contextlib.suppress(ProcessLookupError):
            os.kill(roles[victim], signal.SIGKILL)
        self.kills[at, victim if ranks > 1 else "alone"] += 1
        about = f"{victim} of {ranks} killed during {at}"
        return self._after_kill(run, launched, roles, victim, about)

    def _after_kill(
        self, run: Run, launched: subprocess.Popen[bytes], roles: dict[str, int], victim: str, about: str
    ) -> bool:
        """See that the others end, and say who was killed; True when the run cannot be gone on with."""
        began = time.monotonic()
        while any(alive(process) for process in roles.values()) and time.monotonic() - began < GRACE:
            launched.poll()
            time.sleep(0.01)
        took = time.monotonic() - began
        self.longest = max(self.longest, took)
        left = [role for role, process in roles.items() if alive(process)]
        for role in left:
            os.kill(roles[role], signal.SIGKILL)
        launched.wait()
        if left:
            return self._fail(run, f"{about}: {' and '.join(left)} still ran {GRACE:.0f} seconds later")
        if len(roles) > 1 and not _named(victim, run.last_words()) and not directory.finished(run.directory):
            return self._fail(run, f"{about}: nobody said so")
        return False

    def _end(self, run: Run, launched: subprocess.Popen[bytes], ranks: int) -> bool:
        """Wait for a command that nobody disturbs, and compare what it has left."""
        try:
            code = launched.wait(LIMIT)
        except subprocess.TimeoutExpired:
            for process in processes(launched, ranks).values():
                os.kill(process, signal.SIGKILL)
            launched.wait()
            return self._fail(run, f"the command hangs for {LIMIT:.0f} seconds")
        if code:
            return self._fail(run, f"the same command does not continue, exit code {code}")
        if differences := compare(run, self.wanted):
            return self._fail(run, f"other than without a kill: {', '.join(differences)}")
        self.finished += 1
        print(f"{self.kills.total()} kills, {self.finished} runs finished with the same bits", flush=True)
        shutil.rmtree(run.folder)
        return True

    def _fail(self, run: Run, what: str) -> bool:
        self.failures.append(f"{what} ({run.folder})")
        print(f"FAILED: {self.failures[-1]}\n{run.last_words()}", flush=True)
        return True

    def table(self) -> str:
        """Write what was killed, when."""
        victims = ("alone", "rank 0", "rank 1", "torchrun")
        lines = [f"| killed during | {' | '.join(victims)} |", "|---|" + "---:|" * len(victims)]
        for at in MOMENTS:
            lines.append(f"| {at} | {' | '.join(str(self.kills[at, victim]) for victim in victims)} |")
        lines += ["", f"{self.kills.total()} kills, {self.finished} runs finished with the same bits, "]
        lines[-1] += f"{len(self.failures)} failures; the others ended within {self.longest:.1f} s"
        return "\n".join([*lines, *self.failures])


def compare(run: Run, wanted: Run) -> list[str]:
    """Name what a finished run has left that an undisturbed one has not, or has otherwise."""
    one, two = contents(run), contents(wanted)
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


def contents(run: Run) -> dict[str, Any]:
    """Read everything that a run has left and that must not depend on when it was killed."""
    found: dict[str, Any] = {}
    for path in run.directory.iterdir():
        if path.name == directory.CHECKPOINT:
            content = torch.load(path, weights_only=True)
            found[path.name] = content["step"], _bits(content["parts"])
        elif path.name == directory.RESULT:
            found[path.name] = _lasting(files.read_json(path))
        elif path.name == directory.METRICS:
            with open(path) as file:
                found[path.name] = [_lasting(row) for row in csv.DictReader(file)]
        elif path.name == directory.CONFIG:
            found[path.name] = path.read_text().replace(str(run.folder), "")
        else:
            found[path.name] = path.read_bytes()
    found["ledger"] = [(spent.name, spent.steps, spent.status) for spent in Ledger(run.home).runs()]
    return found


def _lasting(row: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is measured with a clock, and what belongs to the user."""
    return {name: value for name, value in row.items() if not name.startswith(MEASURED) and name not in OF_USER}


def _bits(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {name: _bits(item) for name, item in value.items()}
    return [_bits(item) for item in value] if isinstance(value, list | tuple) else value


def _named(victim: str, text: str) -> bool:
    """Tell whether the ranks, or torchrun in its report, have said which process was killed."""
    if victim == "torchrun":
        return "torchrun, which started rank" in text or "torchrun may have been killed" in text
    number = victim.removeprefix("rank ")
    return f"{victim} on " in text or (f"rank      : {number} " in text and "Signal 9 (SIGKILL)" in text)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
        return port


def main() -> int:
    """Kill, compare, print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=200)
    parser.add_argument("--seed", type=int, default=0, help="of all choices; moments also depend on the machine")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dpopt-soak-"))
    soak = Soak(folder, random.Random(arguments.seed))
    soak.go(arguments.kills)
    print(soak.table())
    if soak.failures:
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
