"""Finished runs side by side: those that differ only in their seed make a group, and groups are compared.

All is read from result.json and metrics.csv. Differences are paired by seed; intervals are Student's, at 95%.
"""

import csv
import glob
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from dpopt import files
from dpopt.config.components import component_name
from dpopt.config.schema import COMPONENTS
from dpopt.runs.directory import METRICS, RESULT
from dpopt.runs.identity import content_key

# Okabe and Ito's, told apart with any color vision; more groups than colors take other lines.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


@dataclass(frozen=True)
class FinishedRun:
    """A run directory that holds a result."""

    directory: Path
    result: dict[str, Any]

    @property
    def seed(self) -> Any:
        """The seed of the configuration."""
        return self.result["config"].get("seed")

    def score(self, measure: str) -> float:
        """Read a number of result.json.

        Raises:
            ValueError: when it holds none of that name.
        """
        value = self.result.get(measure)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{self.directory / RESULT} holds no number {measure}: name another with --measure")
        return float(value)

    def series(self, key: str) -> dict[int, float]:
        """Read a column of metrics.csv, by step.

        Raises:
            ValueError: when there is none.
        """
        path = self.directory / METRICS
        try:
            with path.open(newline="") as file:
                found = {int(row["step"]): float(row[key]) for row in csv.DictReader(file) if row.get(key)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read ({error}): leave this run out") from error
        if not found:
            raise ValueError(f"{path} has no column {key}: name another with --measure, or leave this run out")
        return found


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed, and what tells them from the other groups."""

    label: str
    runs: tuple[FinishedRun, ...]


@dataclass(frozen=True)
class Summary:
    """A measure of a group, and its difference from the first group; a half interval is NaN below three values."""

    group: Group
    mean: float
    sd: float
    half: float
    difference: tuple[float, float, int] | None  # mean, half, pairs; None without pairs


def show(measure: str, value: float) -> float:
    """Convert a number to the unit of the tables: percent, bytes, MB, nats."""
    return value * 100 if "accuracy" in measure else value / 1e6 if measure == "peak_memory_bytes" else value


def interval(values: list[float]) -> tuple[float, float]:
    """Compute the mean and half its 95% confidence interval (NaN below three values)."""
    mean = statistics.fmean(values)
    if len(values) < 3:
        return mean, math.nan
    return mean, float(student.ppf(0.975, len(values) - 1)) * deviation(values) / len(values) ** 0.5


def deviation(values: list[float]) -> float:
    """Compute the standard deviation (NaN below two values, or where one is not finite)."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


def bound(value: float, places: int) -> str:
    """Round an interval's end such that its side of 0 stays visible."""
    while value and float(f"{value:.{places}f}") == 0 and places < 4:
        places += 1
    return f"{value:+.{places}f}"


def find_runs(patterns: Sequence[str]) -> tuple[list[FinishedRun], list[Path]]:
    """Find run directories, or folders of them, by glob; return the finished ones and the others.

    Raises:
        ValueError: when there is no finished run.
    """
    matches = [Path(match) for pattern in patterns for match in sorted(glob.glob(pattern))]
    found: dict[Path, dict[str, Any]] = {}
    for match in matches:
        below = [match / RESULT] if (match / RESULT).exists() else sorted(match.glob(f"*/{RESULT}"))
        found |= {path.parent: files.read_json(path) for path in below if path.parent not in found}
    good = {path for path, result in found.items() if result.get("status") == "finished" and _has_config(result)}
    if not good:
        raise ValueError(f"{' '.join(patterns)} matches no finished run: name directories that hold a {RESULT}")
    runs = [FinishedRun(path, result) for path, result in found.items() if path in good]
    return runs, [path for path in found if path not in good]


def _has_config(result: dict[str, Any]) -> bool:
    config = result.get("config")
    return isinstance(config, dict) and all(isinstance(config.get(name, {}), dict) for name in COMPONENTS)


def group_runs(runs: Sequence[FinishedRun]) -> list[Group]:
    """Collect runs that differ only in their seed, in the order of their first ones.

    Raises:
        ValueError: when a seed is there twice, or when runs of a group had other training data.
    """
    keys: dict[str, list[FinishedRun]] = {}
    for run in runs:
        whole = {name: {} for name in COMPONENTS} | run.result["config"] | {"seed": 0}
        keys.setdefault(content_key(whole), []).append(run)
    for members in keys.values():
        _check_group(members)
    labels = _labels([json.loads(key) for key in keys])
    return [
        Group(label, tuple(sorted(members, key=lambda run: str(run.seed))))
        for label, members in zip(labels, keys.values(), strict=True)
    ]


def _check_group(members: list[FinishedRun]) -> None:
    seeds: dict[Any, FinishedRun] = {}
    data: dict[Any, FinishedRun] = {}
    for run in members:
        if (other := seeds.setdefault(run.seed, run)) is not run:
            raise ValueError(
                f"{other.directory} and {run.directory} are the same run, seed {run.seed}: leave one of them out"
            )
        # MACs under other keys, of other machines, cannot be compared.
        other = data.setdefault(run.result.get("fingerprint_key"), run)
        if other.result.get("data_mac") != run.result.get("data_mac"):
            raise ValueError(
                f"{other.directory} and {run.directory} have one configuration and other training data, so that more "
                "than the seed differs: leave one of them out"
            )


def _labels(configs: list[dict[str, Any]]) -> list[str]:
    """Name groups by what differs: components, their arguments where the component is the same, other keys."""
    words: list[list[str]] = [[] for _ in configs]
    for key in dict.fromkeys([*COMPONENTS, *(key for config in configs for key in config)]):
        nodes = [config.get(key) for config in configs]
        if not _differ(nodes):
            continue
        named = [component_name(node) if isinstance(node, dict) else "" for node in nodes]
        for number, node in enumerate(nodes):
            if not isinstance(node, dict):
                words[number].append(f"{key}={_written(node)}")
                continue
            words[number] += [f"{key}={named[number]}"] if len(set(named)) > 1 else []
            alike = [other for other, name in zip(nodes, named, strict=True) if name == named[number]]
            for argument in dict.fromkeys(name for other in alike if isinstance(other, dict) for name in other):
                if _differ([other.get(argument) for other in alike if isinstance(other, dict)]):
                    words[number].append(f"{key}.{argument}={_written(node.get(argument))}")
    parts = [component_name(configs[0].get(key, {})) for key in ("dataset", "model", "optimizer")]
    return [" ".join(told) or "-".join(parts) for told in words]


def _differ(values: list[Any]) -> bool:
    return any(value != values[0] for value in values)


def _written(value: Any) -> str:
    """Write a value of a content key, where numbers are strings."""
    try:
        return f"{float(value):g}" if not isinstance(value, bool) else str(value).lower()
    except (TypeError, ValueError):
        return "null" if value is None else value if isinstance(value, str) else files.to_json(value)


def summarize(groups: Sequence[Group], measure: str) -> list[Summary]:
    """Compare a measure of all groups, in the unit of the tables, with that of the first.

    Raises:
        ValueError: when a run lacks it.
    """
    scores = [{run.seed: show(measure, run.score(measure)) for run in group.runs} for group in groups]
    found = []
    for group, own in zip(groups, scores, strict=True):
        values = list(own.values())
        mean, half = interval(values)
        pairs = [value - scores[0][seed] for seed, value in own.items() if seed in scores[0]]
        paired = (*interval(pairs), len(pairs)) if pairs and group is not groups[0] else None
        found.append(Summary(group, mean, deviation(values), half, paired))
    return found


def table(summaries: Sequence[Summary], measure: str) -> tuple[list[str], list[list[str]]]:
    """Write the head and the lines of a comparison."""
    unit = " in %" if "accuracy" in measure else ""
    head = ["group", f"{measure}{unit}", "n", "95% interval", "ε", "difference to the first"]
    lines = []
    for one in summaries:
        places = 2 if unit else 4
        spread = f" ± {one.sd:.{places}f}" if math.isfinite(one.sd) else ""
        ends = f"[{one.mean - one.half:.{places}f}, {one.mean + one.half:.{places}f}]"
        lines.append(
            [
                one.group.label,
                f"{one.mean:.{places}f}{spread}" if math.isfinite(one.mean) else "diverged",
                str(len(one.group.runs)),
                ends if math.isfinite(one.half) else "–",
                epsilon_of(one.group),
                _paired(one.difference, places),
            ]
        )
    return head, lines


def _paired(difference: tuple[float, float, int] | None, places: int) -> str:
    if difference is None or not math.isfinite(difference[0]):
        return "–"
    mean, half, pairs = difference
    if not math.isfinite(half):
        return f"{mean:+.{places}f} (n = {pairs}: no interval)"
    return f"{mean:+.{places}f} [{bound(mean - half, places)}, {bound(mean + half, places)}] (n = {pairs})"


def epsilon_of(group: Group) -> str:
    """Write the ε that the runs of a group spent."""
    spent = sorted(run.score("epsilon") for run in group.runs)
    ends = list(dict.fromkeys(f"{value:.3g}".replace("inf", "∞") for value in (spent[0], spent[-1])))
    return " to ".join(ends)


def series_key(measure: str) -> str:
    """Name the column of metrics.csv that leads to a measure: test/accuracy to test_accuracy."""
    return measure if "/" in measure else measure.replace("_", "/", 1)


def curve(group: Group, measure: str) -> list[tuple[int, float, float]]:
    """Compute step, mean and standard deviation of a measure, at the steps that all runs of a group have.

    The deviation is NaN for a single run.

    Raises:
        ValueError: when there is no such step.
    """
    key = series_key(measure)
    series = [run.series(key) for run in group.runs]
    steps = sorted(set.intersection(*(set(points) for points in series)))
    if not steps:
        raise ValueError(f"the runs of {group.label} have no step in common: compare fewer of them")
    columns = [[show(measure, points[step]) for points in series] for step in steps]
    return [(step, statistics.fmean(values), deviation(values)) for step, values in zip(steps, columns, strict=True)]
