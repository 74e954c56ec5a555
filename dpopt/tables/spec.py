"""Tables as data: the runs that experiments/NAME.yaml defines, and what is on disk of them.

Runs are written as on the command line, as words such as `optimizer=dp_sgd,dp_adam`; a comma makes several runs. The
words of a row are those of its file (`base`, then `sizes`), of its table (`runs`, then `at` this size) and its own
(likewise). Of two words with one key the later counts. So a row is exactly `python run.py -m WORDS`.
"""

import csv
import itertools
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from dpopt.config.overrides import from_hydra, with_weights
from dpopt.config.schema import CONF, Config
from dpopt.runs import directory as run_files
from dpopt.runs.identity import content_key, failure_note, finished_runs, hash_of, run_name, same_run

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results"
SIZES = ("smoke", "cpu", "full")
COLUMNS = {
    "eps0_1": "ε = 0.1",
    "eps0_3": "ε = 0.3",
    "eps1": "ε = 1",
    "eps3": "ε = 3",
    "eps7": "ε = 7",
    "eps8": "ε = 8",
    "fixed_noise": "σ given",
    "noiseless": "ε = ∞ (clipped)",
    "none": "not private",
}


@dataclass(frozen=True)
class Job:
    """One run of a table.

    Attributes:
        row: what it varies besides the column and the seed.
        column: value of the column's key.
        config: the run.
        words: what makes it, as after `python run.py`.
    """

    row: str
    column: str
    config: Config
    words: tuple[str, ...]

    @cached_property
    def name(self) -> str:
        """Name of the run."""
        return run_name(self.config)

    def directory(self) -> Path:
        """Locate the run's directory, which need not exist."""
        root = ROOT / self.config.output_dir
        directory = same_run(root, self.name)
        if directory.exists() or not _finished(root):
            return directory
        return _finished(root).get(content_key(self.config), directory)

    def result(self) -> dict[str, Any]:
        """Read the result; `status` may be failed (with `error`), unfinished or not run."""
        directory = self.directory()
        if done := run_files.finished(directory):
            return done
        note = failure_note(replace(self.config, output_dir=str(ROOT / self.config.output_dir)))
        if kept := _page.get(hash_of(self.name)):
            return kept
        if error := run_files.failure(directory, note):
            return {"status": "failed", "error": error}
        return {"status": "unfinished" if directory.exists() else "not run"}

    def on_page_alone(self) -> bool:
        """Say whether the result is that of a page, and the run itself is not here."""
        return self.result() is _page.get(hash_of(self.name))

    def series(self) -> list[dict[str, float]]:
        """Read metrics.csv, row by row."""
        path = self.directory() / run_files.METRICS
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]

    def score(self, measure: str) -> float | None:
        """Read a key of result.json, or the last value of a series of metrics.csv."""
        result = self.result()
        if result["status"] != "finished":
            return None
        series = [] if self.on_page_alone() else self.series()
        value = result[measure] if measure in result else series[-1].get(measure) if series else None
        return None if value is None else float(value)


# Finished runs of a page that count as finished though they are not here, by the hash of their names.
_page: dict[str, dict[str, Any]] = {}


def count_page(name: str, size: str, output: Path = RESULTS) -> None:
    """Let the finished runs of a table's page count where they are not here, and no other page's.

    Raises:
        ValueError: when the page has runs that the table does not, or not by this name.
    """
    _page.clear()
    about = read(name)
    known = {hash_of(job.name) for entry in about["tables"] for job in jobs(about, entry, size)}
    for line in recorded(name, size, output):
        if hash_of(line["run"]) not in known:
            path = folder(name, size, output) / "table.csv"
            raise ValueError(f"{path} holds {line['run']}, which is no run of the table now: it cannot be added to")
        result: dict[str, Any] = {key: _number(value) for key, value in line.items() if value}
        result |= {"git_commit": line["git_commit"], "dataset_size": result.get("train_size", "")}
        result["versions"] = dict(part.split(" ", 1) for part in line["versions"].split("; ") if part)
        _page[hash_of(line["run"])] = result


def _number(text: str) -> Any:
    with suppress(ValueError):
        return int(text) if text.isdecimal() else float(text)
    return text


@cache
def _finished(root: Path) -> dict[str, Path]:
    return finished_runs(root) if root.is_dir() else {}


def names() -> list[str]:
    """List the tables in experiments/.

    Raises:
        ValueError: outside a checkout.
    """
    folder = ROOT / "experiments"
    if not folder.is_dir():
        raise ValueError(f"tables are defined in experiments/ of a checkout, and {ROOT} is none: clone the repository")
    return sorted(path.stem for path in folder.glob("*.yaml"))


def names_at(size: str) -> list[str]:
    """List the tables that exist at a size."""
    return [name for name in names() if size in read(name)["sizes"]]


@cache
def read(name: str) -> dict[str, Any]:
    """Read experiments/NAME.yaml.

    Raises:
        ValueError: when there is no such file.
    """
    if name not in names():
        raise ValueError(f"there is no table {name}: choose one of {', '.join(names())}")
    found: dict[str, Any] = yaml.safe_load((ROOT / "experiments" / f"{name}.yaml").read_text())
    return found


def check_size(about: dict[str, Any], size: str) -> None:
    """Refuse a size that a table does not have.

    Raises:
        ValueError: with the reason and the sizes that it has.
    """
    if size not in about["sizes"]:
        why = about.get("why", {}).get(size, "it is defined for other sizes")
        raise ValueError(f"{about['title']}: not at size {size}, {why}; it has {', '.join(about['sizes'])}")


def column_key(about: dict[str, Any]) -> str:
    """Name the key whose values are the columns."""
    key: str = about.get("column", "privacy")
    return key


def rows_at(entry: dict[str, Any], size: str) -> list[dict[str, Any]]:
    """List the rows that a table has at a size; one that names none is a single row."""
    rows = entry.get("rows", [{}])
    return [row for row in rows if all(size in part.get("sizes", SIZES) for part in (entry, row))]


def words_of(about: dict[str, Any], entry: dict[str, Any], row: dict[str, Any], size: str) -> tuple[str, ...]:
    """Collect the words after `python run.py -m` that make the runs of a row."""
    parts = [about.get("base"), about["sizes"][size]]
    for part in (entry, row):
        parts += [part.get("runs"), part.get("at", {}).get(size)]
    return merge(*(word for part in parts for word in shlex.split(part or "")))


def merge(*words: str) -> tuple[str, ...]:
    """Keep the last word of each key, in the place of the first."""
    return tuple({word.partition("=")[0]: word for word in words}.values())


def jobs(about: dict[str, Any], entry: dict[str, Any], size: str) -> list[Job]:
    """List all runs of a table."""
    found = []
    for row in rows_at(entry, size):
        found += expand(words_of(about, entry, row, size), column_key(about), row.get("label", ""))
    return found


@cache
def expand(words: tuple[str, ...], column: str = "privacy", label: str = "") -> list[Job]:
    """List the runs of `python run.py -m WORDS`, all of its seeds included.

    Raises:
        ValueError: when a row has no columns, or neither a label nor anything that varies.
    """
    with initialize_config_dir(str(CONF), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        choices = {}
        for word, override in zip(words, parser.parse_overrides(list(words)), strict=True):
            key, _, value = word.partition("=")
            choices[key] = list(override.sweep_string_iterator()) if override.is_sweep_override() else [value]
        seeds = [int(seed) for seed in choices.pop("seed", ["0"])]
        if column not in choices:
            raise ValueError(f"a row needs {column}=VALUES, its columns: {shlex.join(words)}")
        varied = [key for key, values in choices.items() if key != column and len(values) > 1]
        found = []
        for values in itertools.product(*choices.values()):
            job = dict(zip(choices, values, strict=True))
            config = _configure([f"{key}={value}" for key, value in job.items()])
            short = len(varied) == 1 and not label
            parts = [job[key] if short else f"{key.rpartition('.')[2]}={job[key]}" for key in varied]
            row = ", ".join([label] * bool(label) + parts)
            if not row:
                raise ValueError(f"a row needs a label where nothing varies: {shlex.join(words)}")
            own = tuple(f"{key}={value}" for key, value in job.items())
            found += [Job(row, job[column], replace(config, seed=seed), (*own, f"seed={seed}")) for seed in seeds]
    return found


def _configure(words: Sequence[str]) -> Config:
    """Compose words as Hydra does, the choices of groups once and values on top of a copy."""
    groups = tuple(word for word in words if (CONF / word.partition("=")[0]).is_dir())
    values = OverridesParser.create().parse_overrides(with_weights([word for word in words if word not in groups]))
    cfg = deepcopy(_compose_groups(groups))
    for override in values:
        OmegaConf.update(cfg, override.key_or_group, override.value(), force_add=override.is_force_add())
    return from_hydra(cfg)


@cache
def _compose_groups(words: tuple[str, ...]) -> DictConfig:
    return compose("config", list(words))


def finished(about: dict[str, Any], size: str) -> tuple[int, int]:
    """Count the finished runs of all tables of a file, and all of them."""
    found = [job.result()["status"] for entry in about["tables"] for job in jobs(about, entry, size)]
    return found.count("finished"), len(found)


def command(words: Sequence[str]) -> str:
    """Write the command that makes the runs of a row."""
    return shlex.join(["python", "run.py", "-m", *words])


def commands(name: str, size: str) -> list[str]:
    """List the commands that make the missing runs, one per row and seed, or one per run where a page has others."""
    about, lines = read(name), []
    seen: set[str] = set()
    for entry in about["tables"]:
        for row in rows_at(entry, size):
            words = words_of(about, entry, row, size)
            found = expand(words, column_key(about), row.get("label", ""))
            if {job.name for job in found} <= seen:
                continue  # made by the commands of an earlier row
            seen |= {job.name for job in found}
            for seed in dict.fromkeys(job.config.seed for job in found):
                runs = [job for job in found if job.config.seed == seed]
                missing = [job for job in runs if job.result()["status"] != "finished"]
                whole = [merge(*words, f"seed={seed}")] if missing else []
                parts = [job.words for job in missing] if any(job.on_page_alone() for job in runs) else whole
                for part in parts:
                    lines.append(f"{shlex.join([sys.executable, 'run.py', '-m', *part])} >>runs/.log 2>&1")
    return list(dict.fromkeys(lines))


def folder(name: str, size: str, output: Path = RESULTS) -> Path:
    """Name the folder of a table's page, figures and CSV file."""
    return output / name / size


def why_kept(name: str, size: str, output: Path = RESULTS) -> str:
    """Say why an existing table is kept: it holds more finished runs than are here."""
    before, (now, _) = len(recorded(name, size, output)), finished(read(name), size)
    path = folder(name, size, output) / "table.csv"
    return f"{path} holds {before} finished runs, here are {now}: kept as it is" if now < before else ""


def recorded(name: str, size: str, output: Path = RESULTS) -> list[dict[str, str]]:
    """Read the finished runs of a page; none where there is no page."""
    path = folder(name, size, output) / "table.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [run for run in csv.DictReader(file) if run["status"] == "finished"]
