"""What a sweep comes to: its cost, printed after the plans of `-m … dry_run=true`; and how costs are written.

This module imports no torch: Hydra imports it before anything else.
"""

from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class Total(Callback):
    """Adds up the plans of a sweep."""

    def __init__(self) -> None:
        self.plans: list[dict[str, Any]] = []
        self.failed = 0

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **options: Any) -> None:
        """Remember what a job returned."""
        if job_return.status == JobStatus.COMPLETED:
            self.plans.append(job_return.return_value or {})
        else:
            self.failed += 1

    def on_multirun_end(self, config: DictConfig, **options: Any) -> None:
        """Print the sum, after a dry run."""
        if config.get("dry_run"):
            print(f"sweep: {summary(self.plans, self.failed)}")


def summary(plans: list[dict[str, Any]], failed: int = 0) -> str:
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
