"""Tables of what has been run, from the presets that make their runs and the results on disk; nothing is trained.

    python scripts/make_tables.py digits               # experiments/digits.yaml → experiments/results/digits.md, .csv
    python scripts/make_tables.py digits --commands    # the commands that make its runs, one per preset and seed

A table's runs are those of its presets (`hydra.mode: MULTIRUN` in conf/experiment/), so what a table shows and what
`python run.py +experiment=NAME` runs cannot differ. A cell is mean ± standard deviation over seeds, with the number of
seeds where some are missing; what was not run says so, and so does what failed.
"""

import argparse
import csv
import platform
import shlex
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from bench_optim import hardware
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from dpopt import store
from dpopt.config import Config, from_hydra

ROOT = Path(__file__).resolve().parents[1]


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

    def result(self, measure: str) -> dict[str, Any]:
        """Its result, with the measure as `score`; `status` says when there is none."""
        directory = store.locate(self.config)
        done = store.finished(directory)
        if done is None:
            error = directory / store.ERROR
            if error.exists():
                return {"status": "failed", "error": error.read_text().splitlines()[0]}
            return {"status": "unfinished" if directory.exists() else "not run"}
        if measure in done:
            return {**done, "score": done[measure]}
        with (directory / store.METRICS).open(newline="") as file:
            return {**done, "score": float(list(csv.DictReader(file))[-1][measure])}


def swept(preset: str, overrides: list[str]) -> tuple[list[str], dict[str, str]]:
    """The overrides that are fixed, and what the preset sweeps, changed or narrowed by those that are not."""
    fixed = [o for o in overrides if not any(mark in o for mark in (",", "("))]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        hydra = compose("config", [f"+experiment={preset}", *fixed], return_hydra_config=True).hydra
    sweeps = dict(hydra.sweeper.params) | dict(o.split("=", 1) for o in overrides if o not in fixed)
    return fixed, {key: value for key, value in sweeps.items() if key not in {o.split("=")[0] for o in fixed}}


def jobs(preset: str, column: str, overrides: list[str]) -> list[Job]:
    """All runs that a preset stands for."""
    fixed, sweeps = swept(preset, overrides)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        parsed = parser.parse_overrides([f"{key}={value}" for key, value in sweeps.items()])
        found = []
        for job in BasicSweeper.split_arguments(parsed, None)[0]:
            config = from_hydra(compose("config", [f"+experiment={preset}", *fixed, *job]))
            values = dict(item.split("=", 1) for item in [*fixed, *job])
            kept = {key: values[key] for key in sweeps if key not in (column, "seed")}
            row = ", ".join(kept.values()) if len(kept) == 1 else ", ".join(f"{k}={v}" for k, v in kept.items())
            found.append(Job(row, values[column], config))
    return found


def commands(name: str) -> list[str]:
    """What makes the runs of experiments/NAME.yaml: a command per preset and seed, to be spread over processes."""
    lines = []
    for entry in read(name)["tables"]:
        for preset in entry["presets"]:
            overrides = entry.get("overrides", [])
            seeds = swept(preset, overrides)[1]["seed"].split(",")
            words = [shlex.quote(word) for word in (f"+experiment={preset}", *overrides)]
            lines += [f"{sys.executable} run.py {' '.join(words)} seed={seed}" for seed in seeds]
    return list(dict.fromkeys(lines))


def read(name: str) -> dict[str, Any]:
    """experiments/NAME.yaml."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "experiments" / f"{name}.yaml").read_text())
    return found


def cell(results: list[dict[str, Any]]) -> str:
    """Mean ± sd of the scores, in %, and what is missing."""
    scores = [100 * r["score"] for r in results if "score" in r]
    failed = [r["error"] for r in results if r["status"] == "failed"]
    if not scores:
        return f"failed: {failed[0][:60]}" if failed else "not run"
    text = f"{statistics.fmean(scores):.1f}" + (f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else "")
    notes = ([f"n = {len(scores)}"] if len(scores) < len(results) else []) + ([f"{len(failed)} failed"] * bool(failed))
    return text + (f" ({', '.join(notes)})" if notes else "")


def table(found: list[Job], column: str, measure: str) -> tuple[str, list[dict[str, Any]], str]:
    """A Markdown table, its runs as rows for a csv file, and the row that is best on average over the columns."""
    rows, columns = (list(dict.fromkeys(getattr(job, key) for job in found)) for key in ("row", "column"))
    results: dict[tuple[str, str], list[dict[str, Any]]] = {(row, c): [] for row in rows for c in columns}
    runs = []
    for job in found:
        result = job.result(measure)
        results[job.row, job.column].append(result)
        keys = ("status", "score", "epsilon", "wall_seconds", "git_commit")
        about = {"row": job.row, column: job.column, "seed": job.config.seed}
        runs.append(about | {key: result.get(key, "") for key in keys} | {"run": store.run_name(job.config)})
    label = {"epsilon": "ε"}.get(column, column)
    lines = ["| | " + " | ".join(f"{label} = {c}" for c in columns) + " |", "|---" * (1 + len(columns)) + "|"]
    lines += [f"| `{row}` | " + " | ".join(cell(results[row, c]) for c in columns) + " |" for row in rows]

    def average(row: str) -> float:
        return statistics.fmean(statistics.fmean(r.get("score", 0.0) for r in results[row, c]) for c in columns)

    return "\n".join(lines), runs, max(rows, key=average)


def page(name: str) -> tuple[str, list[dict[str, Any]]]:
    """All tables of experiments/NAME.yaml, and their runs."""
    about = read(name)
    column, measure = about["column"], about.get("measure", "test_accuracy")
    parts, runs = [f"# {about['title']}\n\n{about['setting'].strip()}\n"], []
    for entry in about["tables"]:
        overrides = entry.get("overrides", [])
        found = [
            replace(job, row=prefix + job.row)
            for preset, prefix in entry["presets"].items()
            for job in jobs(preset, column, overrides)
        ]
        text, more, best = table(found, column, measure)
        made = ", ".join(f"`python run.py {' '.join([f'+experiment={p}', *overrides])}`" for p in entry["presets"])
        notes = [entry["notes"]] if "notes" in entry else []
        notes += [f"Best on average: {best}."] if about.get("choose") else []
        parts.append(f"## {entry['title']}\n\n{text}\n\n{' '.join([*notes, made])}.\n")
        runs += [{"table": entry["title"], **run} for run in more]
    done = [run for run in runs if run["status"] == "finished"]
    commits = sorted({str(run["git_commit"])[:12] for run in done})
    hours = sum(run["wall_seconds"] for run in done) / 3600
    parts.append(
        f"{len(done)} of {len(runs)} runs, {hours:.1f} process hours, at commit {', '.join(commits) or 'none'}; "
        f"{hardware('cpu')}; Python {platform.python_version()}. Every run: [{name}.csv]({name}.csv).\n"
    )
    return "\n".join(parts), runs


def main() -> None:
    """Write the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = sorted(path.stem for path in (ROOT / "experiments").glob("*.yaml"))
    parser.add_argument("names", nargs="+", choices=choices)
    parser.add_argument("--output", type=Path, default=ROOT / "experiments/results")
    parser.add_argument("--commands", action="store_true", help="print the commands that make the runs, and stop")
    arguments = parser.parse_args()
    for name in arguments.names:
        if arguments.commands:
            print("\n".join(commands(name)))
            continue
        text, runs = page(name)
        (arguments.output / f"{name}.md").write_text(text)
        with (arguments.output / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(runs[0]))
            writer.writeheader()
            writer.writerows(runs)
        print(text)


if __name__ == "__main__":
    main()
