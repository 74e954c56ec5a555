"""Run what is missing of tables, several processes at once, and say how far they are."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from dpopt.runs.sweep import duration
from dpopt.tables import spec
from dpopt.tables.spec import Job

_POLL = 1.0  # seconds


def launch(names: Sequence[str], size: str, processes: int) -> None:
    """Run the missing runs of tables; what fails stops no other.

    Args:
        names: of the tables.
        size: of the tables.
        processes: at once; each has its number in DPOPT_JOB, by which several GPUs take turns.
    """
    waiting = list(dict.fromkeys(line for name in names for line in spec.commands(name, size)))
    progress = Progress(list({job.name: job for name in names for job in _jobs(name, size)}.values()))
    running: dict[int, subprocess.Popen[bytes]] = {}
    (spec.ROOT / "runs").mkdir(exist_ok=True)
    try:
        while waiting or running:
            for number in range(processes):
                if waiting and number not in running:
                    environment = {**os.environ, "DPOPT_JOB": str(number)}
                    running[number] = subprocess.Popen(
                        waiting.pop(0), shell=True, cwd=spec.ROOT, env=environment, stdin=subprocess.DEVNULL
                    )
            time.sleep(_POLL)
            running = {number: process for number, process in running.items() if process.poll() is None}
            progress.show()
    except KeyboardInterrupt:  # the runs have got it, too, and write their results
        for process in running.values():
            process.wait()
        raise


def _jobs(name: str, size: str) -> list[Job]:
    about = spec.read(name)
    return [job for entry in about["tables"] for job in spec.jobs(about, entry, size)]


class Progress:
    """Lines on stderr: runs done, all runs, and the time that is left at the speed so far.

    Args:
        jobs: all runs, those that are finished among them.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs, self.began = jobs, time.monotonic()
        self.before, _ = self.shown = self._count()
        print(self._line(), file=sys.stderr, flush=True)

    def show(self) -> None:
        """Print a line if a run has ended since the last one."""
        if (count := self._count()) != self.shown:
            self.shown = count
            print(self._line(), file=sys.stderr, flush=True)

    def _count(self) -> tuple[int, int]:
        statuses = [job.result()["status"] for job in self.jobs]
        return statuses.count("finished"), statuses.count("failed")

    def _line(self) -> str:
        done, failed = self.shown
        new, left = done - self.before, len(self.jobs) - done - failed
        parts = [f"{done} of {len(self.jobs)} runs done", *([f"{failed} failed"] if failed else [])]
        if new > 0:
            elapsed = time.monotonic() - self.began
            parts += [duration(elapsed), *([f"about {duration(elapsed / new * left)} left"] if left else [])]
        return ", ".join(parts)
