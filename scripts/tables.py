"""Tables as data: which runs a table stands for, and what has come of them. Read by every script that shows results.

experiments/NAME.yaml says which presets make the rows of a table; the runs are those that the presets stand for
(`hydra.mode: MULTIRUN` in conf/experiment/), so what a table shows and what `python run.py experiment=PRESET` runs
cannot differ. A scale is an overlay, conf/size/SCALE.yaml, on the same presets.
"""

import csv
import math
import shlex
import statistics
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from scipy.stats import t as student

from dpopt.config.overrides import from_hydra
from dpopt.config.schema import Config
from dpopt.runs import directory as run_files
from dpopt.runs.identity import content_key, finished_runs, run_name

ROOT = Path(__file__).resolve().parents[1]
SCALES = ("smoke", "cpu", "full")
COLUMNS = {"eps1": "ε = 1", "eps3": "ε = 3", "eps8": "ε = 8", "noiseless": "ε = ∞ (clipped)", "none": "not private"}


@dataclass(frozen=True)
class Job:
    """One run of a table.

    Attributes:
        row: what it varies beside the column and the seed.
        column: value of the column's key.
        config: the run.
    """

    row: str
    column: str
    config: Config

    def directory(self) -> Path:
        """Where the run is, or will be."""
        root = ROOT / self.config.output_dir
        directory = root / run_name(self.config)
        return directory if directory.exists() else _finished(root).get(content_key(self.config), directory)

    def result(self) -> dict[str, Any]:
        """Its result; `status` says when there is none: failed (with `error`), unfinished, or not run."""
        directory = self.directory()
        if done := run_files.finished(directory):
            return done
        if error := run_files.failure(self.config, directory):
            return {"status": "failed", "error": error}
        return {"status": "unfinished" if directory.exists() else "not run"}

    def series(self) -> list[dict[str, float]]:
        """metrics.csv, row by row."""
        path = self.directory() / run_files.METRICS
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]

    def score(self, measure: str) -> float | None:
        """A figure of a finished run: a key of result.json, or the last value of a series of metrics.csv."""
        result = self.result()
        if result["status"] != "finished":
            return None
        series = self.series()
        value = result[measure] if measure in result else series[-1].get(measure) if series else None
        return None if value is None else float(value)


def names() -> list[str]:
    """Everything in experiments/ that can be asked for."""
    return sorted(path.stem for path in (ROOT / "experiments").glob("*.yaml"))


def names_at(scale: str) -> list[str]:
    """Those that exist at a scale."""
    return [name for name in names() if scale in read(name)["scales"]]


@cache
def read(name: str) -> dict[str, Any]:
    """experiments/NAME.yaml.

    Raises:
        ValueError: when there is no such file.
    """
    path = ROOT / "experiments" / f"{name}.yaml"
    if not path.exists():
        raise ValueError(f"there is no table {name}: choose one of {', '.join(names())}")
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def overlay(about: dict[str, Any], scale: str) -> list[str]:
    """The override that a scale adds to a table's presets; none where they are at that scale by themselves.

    Raises:
        ValueError: when the table does not exist at this scale.
    """
    if scale not in about["scales"]:
        why = about.get("why", {}).get(scale, "its presets are for other scales")
        raise ValueError(f"{about['title']}: not at scale {scale}, {why}; it has {', '.join(about['scales'])}")
    return [] if scale == about["scales"][-1] else [f"size={scale}"]


def overrides_of(about: dict[str, Any], entry: dict[str, Any], row: dict[str, Any], scale: str) -> tuple[str, ...]:
    """The words after `python run.py` that make the runs of a row, or of several rows that a preset sweeps."""
    words = [f"experiment={row['preset']}", *overlay(about, scale)]
    for part in (entry, row):
        words += part.get("overrides", []) + part.get("at", {}).get(scale, [])
    return tuple(words)


def rows_at(entry: dict[str, Any], scale: str) -> list[dict[str, Any]]:
    """The rows of a table that are made at a scale."""
    return [row for row in entry["rows"] if all(scale in x.get("scales", SCALES) for x in (entry, row))]


def jobs(about: dict[str, Any], entry: dict[str, Any], scale: str) -> list[Job]:
    """All runs of a table."""
    found = []
    for row in rows_at(entry, scale):
        found += expand(overrides_of(about, entry, row, scale), about["column"], row.get("label", ""))
    return found


def finished(about: dict[str, Any], scale: str) -> tuple[int, int]:
    """How many runs of all of its tables are finished, and how many there are."""
    found = [job.result()["status"] for entry in about["tables"] for job in jobs(about, entry, scale)]
    return found.count("finished"), len(found)


@cache
def sweep(words: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """Overrides that are fixed, and what the preset sweeps, changed or narrowed by those that are not."""
    fixed = [word for word in words if not any(mark in word for mark in (",", "("))]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        hydra = compose("config", fixed, return_hydra_config=True).hydra
    named = {word.split("=")[0] for word in fixed}
    sweeps = dict(hydra.sweeper.params) | dict(word.split("=", 1) for word in words if word not in fixed)
    given = dict(word.split("=", 1) for word in fixed)
    return fixed, {key: given[key] if key in named else value for key, value in sweeps.items()}


@cache
def expand(words: tuple[str, ...], column: str, label: str = "") -> list[Job]:
    """The runs that `python run.py WORDS` stands for, every seed of them."""
    fixed, swept = sweep(words)
    seeds = [int(seed) for seed in swept["seed"].split(",")]
    sweeps = {key: values for key, values in swept.items() if key != "seed"}
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        parsed = parser.parse_overrides([f"{key}={value}" for key, value in sweeps.items()])
        grid = [dict(word.split("=", 1) for word in job) for job in BasicSweeper.split_arguments(parsed, None)[0]]
        varied = [key for key in sweeps if key != column and len({job[key] for job in grid}) > 1]
        found = []
        for job in grid:
            others = [word for word in fixed if word.split("=")[0] not in job and not word.startswith("seed=")]
            config = from_hydra(compose("config", [*others, *(f"{key}={value}" for key, value in job.items())]))
            values = [
                job[key] if len(varied) == 1 and not label else f"{key.rpartition('.')[2]}={job[key]}" for key in varied
            ]
            row = ", ".join([label] * bool(label) + values) or words[0].rpartition("=")[2]
            found += [Job(row, job[column], replace(config, seed=seed)) for seed in seeds]
    return found


def commands(name: str, scale: str) -> list[str]:
    """What makes the runs of a table that are not finished: a command per preset and seed."""
    about, lines = read(name), []
    seen: set[str] = set()
    for entry in about["tables"]:
        for row in rows_at(entry, scale):
            words = overrides_of(about, entry, row, scale)
            found = expand(words, about["column"])
            if {run_name(job.config) for job in found} <= seen:
                continue  # made by the commands of an earlier row
            seen |= {run_name(job.config) for job in found}
            line = shlex.join([sys.executable, "run.py", *(word for word in words if not word.startswith("seed="))])
            for seed in dict.fromkeys(job.config.seed for job in found):
                runs = [job for job in found if job.config.seed == seed]
                if any(job.result()["status"] != "finished" for job in runs):
                    lines.append(f"{line} seed={seed} >>runs/.log 2>&1")
    return list(dict.fromkeys(lines))


@cache
def _finished(root: Path) -> dict[str, Path]:
    return finished_runs(root) if root.is_dir() else {}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95 % confidence interval (Student's t), which is NaN for fewer than three values."""
    mean = statistics.fmean(values)
    if len(values) < 3:
        return mean, math.nan
    return mean, float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def stem(name: str, scale: str) -> str:
    """The name of a table's files: with the scale, unless there is but one that means something."""
    return name if scale != "smoke" and len(read(name)["scales"]) <= 2 else f"{name}_{scale}"


def why_kept(name: str, scale: str, output: Path) -> str:
    """Why what was written before is kept: it holds more finished runs than there are here. Else nothing."""
    path, about = output / f"{stem(name, scale)}.csv", read(name)
    if not path.exists():
        return ""
    with path.open(newline="") as file:
        before = sum(run["status"] == "finished" for run in csv.DictReader(file))
    now, _ = finished(about, scale)
    return f"{path} holds {before} finished runs, here are {now}: kept as it is" if now < before else ""
