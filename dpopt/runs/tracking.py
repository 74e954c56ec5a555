"""Tracking: metrics.csv, which is the truth, and in addition Weights & Biases or TensorBoard.

A tracker that fails is dropped with one line of warning: it never ends a run, and never makes it wait for long.
"""

import csv
import os
import sys
from pathlib import Path
from typing import Any, Protocol

from dpopt import files

_wandb_online_failed = False  # remembered for the rest of a sweep: one wait for a dead server is enough


class Tracker(Protocol):
    """What training asks of a tracker."""

    def start(self, directory: Path, name: str, config: dict[str, Any], resumed: bool) -> None:
        """Open the tracker for the run in `directory`; may raise anything."""
        ...

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record values of a step."""
        ...

    def finish(self) -> None:
        """Close the tracker."""
        ...


class CsvOnly:
    """No tracker in addition to metrics.csv."""

    def start(self, directory: Path, name: str, config: dict[str, Any], resumed: bool) -> None: ...

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def finish(self) -> None: ...


class Wandb:
    """Weights & Biases: offline without a key or without an answering server, and never a prompt.

    WANDB_PROJECT, WANDB_NAME, WANDB_DIR and WANDB_RUN_ID count, as a user or an agent of a W&B sweep sets them.

    Args:
        project: the project's name; null for WANDB_PROJECT, or dpopt.
        entity: the team or user, when it is not the key's own.
    """

    def __init__(self, project: str | None = None, entity: str | None = None) -> None:
        self.project, self.entity = project, entity
        self.run: Any = None

    def wants_history(self, finished: bool) -> bool:
        """Tell whether earlier rows are to be logged again.

        An offline run is recorded in parts, the last of which replaces the others when they are uploaded. An agent of a
        sweep waits for metrics, also of a run that was finished before.
        """
        return bool(os.environ.get("WANDB_SWEEP_ID")) or (not finished and bool(self.run.offline))

    def start(self, directory: Path, name: str, config: dict[str, Any], resumed: bool) -> None:
        global _wandb_online_failed
        import wandb

        mode = os.environ.get("WANDB_MODE")
        if mode is None or _wandb_online_failed:
            online = not _wandb_online_failed and wandb.login(prompt=False, verify=False)
            mode = "online" if online else "offline"
        of_user = os.environ.get
        folder = Path(of_user("WANDB_DIR") or directory)
        folder.mkdir(parents=True, exist_ok=True)
        arguments: dict[str, Any] = dict(
            project=self.project or of_user("WANDB_PROJECT") or "dpopt",
            entity=self.entity,
            dir=folder,
            name=of_user("WANDB_NAME") or name,
            id=of_user("WANDB_RUN_ID") or name[-64:],
            config=config,
            resume="allow" if resumed and mode == "online" else None,
            reinit="finish_previous",
        )
        settings = wandb.Settings(init_timeout=10, silent=True)
        try:
            self.run = wandb.init(mode=mode, settings=settings, **arguments)  # type: ignore[arg-type]
        except Exception as error:
            _wandb_online_failed = True
            warn(f"W&B does not answer ({type(error).__name__}): recording offline")
            wandb.teardown()  # else the run's id counts as taken
            self.run = wandb.init(mode="offline", settings=settings, **arguments | {"resume": None})

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def finish(self) -> None:
        self.run.finish()
        if self.run.offline:
            warn(f"recorded offline; to upload: wandb sync {Path(self.run.dir).parent}")


class TensorBoard:
    """TensorBoard event files below the run directory; needs the package `tensorboard`."""

    def start(self, directory: Path, name: str, config: dict[str, Any], resumed: bool) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("it is not installed: pip install tensorboard") from error
        self.writer = SummaryWriter(directory / "tensorboard")

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


class Metrics:
    """metrics.csv and a tracker behind it.

    Args:
        path: the csv file; `rows` rows of it are kept, what a crashed run wrote beyond its checkpoint is dropped.
        rows: 0 for a new run.
        tracker: in addition to the file.
        name: the run's name.
        config: shown by the tracker.
    """

    def __init__(self, path: Path, rows: int, tracker: Tracker, name: str, config: dict[str, Any]) -> None:
        self.path = path
        self.file: Any = None
        self.rows: list[dict[str, str]] = []
        if rows and path.exists():
            with open(path, newline="") as file:
                self.rows = list(csv.DictReader(file))[:rows]
        if len(self.rows) < rows:
            warn(f"{path} has lost rows; going on with what is there")
        self._rewrite(list(self.rows[0]) if self.rows else [])
        self.tracker: Tracker | None = tracker
        self._guard(lambda t: t.start(path.parent, name, config, rows > 0))
        if _wants_history(self.tracker, finished=False):
            for step, values in map(_numbers, self.rows):
                self._guard(lambda t, step=step, values=values: t.log(step, values))

    def log(self, step: int, values: dict[str, float], unsaved: dict[str, float]) -> None:
        """Append a row; `unsaved` values go to the tracker only, because a resumed run cannot repeat them."""
        row = {name: str(value) for name, value in {"step": step, **values}.items()}
        new = [name for name in row if name not in self.columns]
        self.rows.append(row)
        if new:  # the first row, or diagnostics switched on for the rest of a run
            self._rewrite(self.columns + new)
        else:
            with files.writing(self.path):
                self.writer.writerow(row)
                self.file.flush()
        self._guard(lambda t: t.log(step, values | unsaved))

    def sync(self) -> int:
        """Put the file on the disk; return its number of rows."""
        with files.writing(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())
        return len(self.rows)

    def _rewrite(self, columns: list[str]) -> None:
        self.columns = columns
        if self.file is not None:
            self.file.close()
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with files.writing(self.path):
            with open(temporary, "w", newline="") as file:
                writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
                if columns:
                    writer.writeheader()
                writer.writerows(self.rows)
            os.replace(temporary, self.path)
            self.file = open(self.path, "a", newline="")  # noqa: SIM115 (closed by `close`)
        self.writer = csv.DictWriter(self.file, columns, restval="", lineterminator="\n")

    def close(self) -> None:
        """Close file and tracker."""
        self._guard(lambda t: t.finish())
        with files.writing(self.path):
            self.file.close()

    def _guard(self, action: Any) -> None:
        if self.tracker is None:
            return
        try:
            action(self.tracker)
        except Exception as error:
            warn(f"{type(self.tracker).__name__} failed ({error}); going on with metrics.csv alone")
            self.tracker = None


def log_finished(path: Path, tracker: Tracker, name: str, config: dict[str, Any]) -> None:
    """Log the metrics of a finished run again, for a tracker that waits for them."""
    if not _wants_history(tracker, finished=True):
        return
    try:
        tracker.start(path.parent, name, config, False)
        with open(path, newline="") as file:
            for step, values in map(_numbers, csv.DictReader(file)):
                tracker.log(step, values)
        tracker.finish()
    except Exception as error:
        warn(f"{type(tracker).__name__} failed ({error}); the metrics are in {path}")


def _wants_history(tracker: Tracker | None, finished: bool) -> bool:
    wants = getattr(tracker, "wants_history", None)  # other trackers append to what they have
    return wants is not None and bool(wants(finished))


def _numbers(row: dict[str, str]) -> tuple[int, dict[str, float]]:
    """Read a row of metrics.csv; a series that has no value there is left out."""
    return int(row["step"]), {key: float(value) for key, value in row.items() if value and key != "step"}


def warn(message: str) -> None:
    """One line on stderr."""
    print(f"dpopt: {message}", file=sys.stderr)
