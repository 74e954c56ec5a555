"""What a sweep comes to, printed at its end: its results side by side, or its cost; and how costs are written.

This module imports no torch: Hydra imports it before anything else.
"""

import sys
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from dpopt.runs.result import HOLDOUT


class Summary(Callback):
    """Collects what the jobs of a sweep return."""

    def __init__(self) -> None:
        self.jobs: list[tuple[list[str], dict[str, Any]]] = []
        self.dry_run = False

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **options: Any) -> None:
        """Remember what a job returned; an error is shown at once, since Hydra shows one of them, at the end."""
        words = list(job_return.overrides or [])
        try:
            self.jobs.append((words, job_return.return_value or {}))
        except Exception as error:
            self.jobs.append((words, {"status": "failed", "error": str(error)}))
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                print(f"failed: {' '.join(words)}: {error}", file=sys.stderr)

    def on_multirun_start(self, config: DictConfig, **options: Any) -> None:
        """Leave the sweep to `report_sweeps`, because Hydra calls nothing at the end of one that fails."""
        self.dry_run = bool(config.get("dry_run"))
        _SWEEPS.append(self)

    def report(self) -> None:
        """Print the sum of the plans, or the results."""
        if self.dry_run:
            failed = sum(result.get("status") == "failed" for _, result in self.jobs)
            print(f"sweep: {cost([r for _, r in self.jobs if r.get('status') != 'failed'], failed)}")
        elif len(self.jobs) > 1:
            print(side_by_side(self.jobs))


_SWEEPS: list[Summary] = []  # begun and not reported


def report_sweeps() -> None:
    """Print the summary of every sweep that has ended."""
    while _SWEEPS:
        _SWEEPS.pop().report()


def side_by_side(jobs: list[tuple[list[str], dict[str, Any]]]) -> str:
    """A line per job: what is its own among its overrides, accuracy, ε and time, or why there is none.

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
    return "\n".join([f"sweep: {where}, ε spent, time", *lines])


def cost(plans: list[dict[str, Any]], failed: int = 0) -> str:
    """One line: runs, those that are finished, hours one after the other, and the most memory."""
    if not plans and not failed:
        return "its plans were made by other processes, so they are not added up; leave the launcher out"
    open_ = [plan for plan in plans if plan.get("status") != "finished"]
    times = [plan["seconds"] for plan in open_ if plan.get("seconds") is not None]
    memory = [plan["memory_bytes"] for plan in open_ if plan.get("memory_bytes") is not None]
    parts = [f"{len(plans) + failed} runs, {len(plans) - len(open_)} of them finished"]
    parts += [f"{failed} refused"] if failed else []
    if open_:
        hours = f"about {duration(sum(times))} on this machine, one after the other" if times else "time unknown"
        parts.append(hours if len(times) in (0, len(open_)) else f"{hours} ({len(open_) - len(times)} unknown)")
    parts += [f"up to {size(max(memory))} beside code and data"] if memory else []
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """A time as a person would say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.0f} days"


def size(count: float) -> str:
    """Bytes, with three digits."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
