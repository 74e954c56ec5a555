"""The ledger: what every private run on a user's machine has spent, and on which data.

Each run adds its mechanism and the MAC of its data: once when it begins, with all the steps that it plans, and again
when it ends, with the steps that it took. A run that was killed therefore counts in full. Runs on one dataset are
composed by privacy loss distributions: publishing all of them, or choosing one of them, costs the ε of the composition.
Runs under `randomness=research` make no claim, and are not in it.

The file lies next to the user's fingerprint key and never leaves the machine. A line is a JSON object.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpopt import files
from dpopt.privacy.accounting import compose_epsilon
from dpopt.privacy.plan import PrivacyPlan


@dataclass(frozen=True)
class Spending:
    """One run's mechanism.

    Attributes:
        run: identifies the run, by its key.
        name: of the run directory.
        dataset: name of the dataset.
        data: MAC of the dataset's fingerprint.
        key_id: names the key of the MAC.
        noise_multiplier: σ of a step's releases together; 0 for none.
        sample_rate: q.
        steps: taken, or planned while the run is not over. Of a run with correlated noise these three are the
            subsampled Gaussians that its steps compose (`PrivacyPlan.composed`).
        delta: δ of the run.
        status: `planned`, `interrupted`, `time_limit` or `finished`.
        time: seconds since 1970.
        statistics_noise: noise multiplier of statistics of all examples, released before the steps; 0 for none.
    """

    run: str
    name: str
    dataset: str
    data: str
    key_id: str
    noise_multiplier: float
    sample_rate: float
    steps: int
    delta: float
    status: str
    time: float
    statistics_noise: float = 0.0


def spending(plan: PrivacyPlan, steps: int, status: str, **about: str) -> Spending:
    """Describe a run's mechanism; `about` names `run`, `name`, `dataset`, `data` and `key_id`."""
    noise, rate, count = plan.composed(steps)
    return Spending(
        noise_multiplier=noise,
        sample_rate=rate,
        steps=count,
        delta=plan.delta,
        status=status,
        time=time.time(),
        statistics_noise=plan.statistics_noise if noise else 0.0,
        **about,
    )


class Ledger:
    """The ledger in a folder.

    Args:
        folder: where the user's runs keep what they share.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ledger.jsonl"

    def add(self, entry: Spending) -> None:
        """Append an entry, on the disk before this returns.

        Raises:
            OSError: when it cannot be written, in a sentence.
        """
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked("a") as file:
                values = asdict(entry)
                if not entry.statistics_noise:  # which earlier versions do not know
                    del values["statistics_noise"]
                file.write(files.to_json(values) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(
                f"the ledger {self.path} cannot be written ({error.strerror}): set DPOPT_HOME to a folder of yours, or "
                "ledger=off for a run that is not to be counted"
            ) from error

    def runs(self) -> list[Spending]:
        """Read the latest entry of every run, in the order in which they began.

        Raises:
            ValueError: when a line is damaged.
        """
        if not self.path.exists():
            return []
        found: dict[str, Spending] = {}
        with self._locked("r") as file:
            for number, line in enumerate(file, start=1):
                try:
                    entry = Spending(**files.from_json(line))
                except (ValueError, TypeError) as error:
                    raise ValueError(
                        f"line {number} of the ledger {self.path} is damaged: repair or delete that line, which leaves "
                        "its run uncounted"
                    ) from error
                found[entry.run] = entry
        return list(found.values())

    @contextlib.contextmanager
    def _locked(self, mode: str) -> Iterator[Any]:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        with open(descriptor, mode) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if mode == "a":
                file.seek(0, os.SEEK_END)
            yield file


def by_data(runs: Iterable[Spending]) -> dict[tuple[str, str], list[Spending]]:
    """Group runs by the dataset that they were trained on, told apart by key and MAC."""
    groups: dict[tuple[str, str], list[Spending]] = {}
    for run in runs:
        groups.setdefault((run.key_id, run.data), []).append(run)
    return groups


def total_epsilon(runs: Iterable[Spending], delta: float) -> float:
    """Compose runs on one dataset: the ε at δ of everything that they released."""
    runs = list(runs)
    releases = [(run.noise_multiplier, run.sample_rate, run.steps) for run in runs]
    releases += [(run.statistics_noise, 1.0, 1) for run in runs if run.statistics_noise]
    return compose_epsilon(releases, delta)


def describe_total(folder: Path, run: Spending, counted: bool) -> str:
    """Say, for the privacy card, what all runs on a run's dataset spend together.

    Args:
        folder: of the ledger.
        run: what the run has spent.
        counted: whether the ledger holds it; else it is added here.
    """
    try:
        listed = [other for other in Ledger(folder).runs() if (other.key_id, other.data) == (run.key_id, run.data)]
        together = listed if counted else [*listed, run]
        delta = max(other.delta for other in together)
        total = f"({total_epsilon(together, delta):.4g}, {delta:g})"
    except (ValueError, OSError):
        return "not known, because the ledger cannot be read or composed: `dpopt ledger` says why"
    others = "" if counted else "; this run is not in the ledger, and is counted here"
    return f"{len(together)} private run{'s' * (len(together) > 1)} on this dataset, together {total}{others}"
