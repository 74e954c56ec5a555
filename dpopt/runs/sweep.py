"""The summary of a sweep: its results side by side, or its cost; and how durations and sizes are written.

This module imports no torch: Hydra imports it before anything else.
"""

import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from dpopt import files
from dpopt.runs.result import HOLDOUT
from dpopt.runs.search import Score, price, searches

_UNMEASURED = (
    "The hold-out was not measured, and a choice by test accuracy uses the test set up: diagnostics=true measures the "
    "hold-out, outside ε."
)


def failed(error: Exception) -> dict[str, Any]:
    """Write a refusal as the result of a job, so that Hydra neither prints it nor ends a sweep."""
    return {"status": "failed", "error": str(error)}


class Summary(Callback):
    """Collects what the jobs of a run or a sweep return.

    A launcher may run jobs in other processes, on other machines. Each has a copy of this callback, so that a sweep
    collects results in a folder, a file per job.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None  # of a sweep
        self.dry_run = self.searches = False
        self.error = ""  # of a single run

    def on_run_start(self, config: DictConfig, **options: Any) -> None:
        """Leave the end to `report`, because Hydra calls nothing at the end of a sweep that fails."""
        _OPEN.append(self)

    def on_multirun_start(self, config: DictConfig, **options: Any) -> None:
        """Do the same for a sweep."""
        self.folder = Path(config.hydra.sweep.dir).absolute() / f".{uuid.uuid4().hex}"
        self.dry_run, self.searches = bool(config.get("dry_run")), searches(config.hydra)
        _OPEN.append(self)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **options: Any) -> None:
        """Keep what a job returned; a sweep shows an error at once."""
        words = list(job_return.overrides or [])
        value = job_return._return_value  # its property prints a line about an error, and raises it
        raised = job_return.status != JobStatus.COMPLETED
        result = failed(value) if raised else value.result if isinstance(value, Score) else value or {}
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{config.hydra.job.num:06}.json"
            files.write_json(path, {"words": words, "result": result})
            if result.get("status") == "failed":
                print(f"failed: {' '.join(words)}: {result['error']}", file=sys.stderr)
        elif not raised:  # Hydra shows what was raised
            self.error = result.get("error", "")

    def report(self) -> bool:
        """Print the sum of the plans, or the results, or why a run failed; tell whether all jobs succeeded."""
        if self.folder is None:
            if self.error:
                print(self.error, file=sys.stderr)
            return not self.error
        stored = [files.read_json(path) for path in sorted(self.folder.glob("*.json"))]
        shutil.rmtree(self.folder, ignore_errors=True)
        jobs = [(entry["words"], entry["result"]) for entry in stored]
        done = [result for _, result in jobs if result.get("status") != "failed"]
        if self.dry_run:
            print(f"sweep: {cost(done, len(jobs) - len(done))}")
        elif len(jobs) > 1:
            print(side_by_side(jobs))
        if self.searches and done:
            print(price(done, len(jobs) - len(done)))
        return len(done) == len(jobs)


_OPEN: list[Summary] = []  # begun and not reported


def report() -> bool:
    """Print the summary of every run and sweep that has ended; tell whether all jobs succeeded."""
    complete = [_OPEN.pop().report() for _ in range(len(_OPEN))]
    return all(complete)


def side_by_side(jobs: list[tuple[list[str], dict[str, Any]]]) -> str:
    """Write a line per job: its own overrides, accuracy, ε and time.

    A job without a result has its error instead.

    The accuracy is that on the hold-out, by which to choose, where there is one.

    Args:
        jobs: overrides and result of each, the result as in result.json, or with `status` failed and `error`.
    """
    common = set.intersection(*(set(words) for words, _ in jobs))
    names = [" ".join(word for word in words if word not in common) for words, _ in jobs]
    width = max(map(len, names))
    key = HOLDOUT if any(HOLDOUT in result for _, result in jobs) else "test_accuracy"
    lines = []
    for name, (_, result) in zip(names, jobs, strict=True):
        if "test_accuracy" in result:
            accuracy = f"{result[key]:7.2%}" if key in result else "      –"
            told = f"{accuracy}   ε = {result['epsilon']:<6.4g}   {duration(result['wall_seconds'])}"
            told += "" if result["status"] == "finished" else f"   {result['status']}"
        else:
            told = f"failed: {result.get('error', 'no result')}"
        lines.append(f"{name:{width}}   {told}")
    where = "test accuracy" if key == "test_accuracy" else "accuracy on the hold-out"
    held_out = any(result.get("config", {}).get("holdout") for _, result in jobs)
    note = [_UNMEASURED] if held_out and key == "test_accuracy" else []
    return "\n".join([f"sweep: {where}, ε spent, time", *lines, *note])


def cost(plans: list[dict[str, Any]], failed: int = 0) -> str:
    """Sum up plans in a line: runs, those finished, time, most memory."""
    open_ = [plan for plan in plans if plan.get("status") != "finished"]
    times = [plan["seconds"] for plan in open_ if plan.get("seconds") is not None]
    memory = [plan["memory_bytes"] for plan in open_ if plan.get("memory_bytes") is not None]
    parts = [f"{len(plans) + failed} runs, {len(plans) - len(open_)} of them finished"]
    parts += [f"{failed} refused"] if failed else []
    if open_:
        hours = f"about {duration(sum(times))} on this machine, one after the other" if times else "time unknown"
        parts.append(hours if len(times) in (0, len(open_)) else f"{hours} ({len(open_) - len(times)} unknown)")
    parts += [f"up to {size(max(memory))} excluding code and data"] if memory else []
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """Write a time as a person would say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.0f} days"


def size(count: float) -> str:
    """Write bytes with three digits."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
