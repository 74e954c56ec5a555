"""Tables of what has been run, from the presets that make their runs and the results on disk; nothing is trained.

    python scripts/make_tables.py cifar10 --scale cpu               # → experiments/results/cifar10_cpu.md, .csv, .tex
    python scripts/make_tables.py cifar10 --scale cpu --commands    # what makes its missing runs
    python scripts/make_tables.py cifar10 --scale full --plan       # what its runs would cost on this machine

A cell is mean ± standard deviation over seeds, with the number of seeds where some are missing; what was not run says
so, and so does what failed. Differences to a table's baseline are paired by seed and come with a 95 % confidence
interval (Student's t). Published figures stand beside ours with source and protocol; their difference is given only
where data set, model, N, ε and δ agree.
"""

import argparse
import csv
import math
import shlex
import statistics
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import tables
from tables import COLUMNS, ROOT, SCALES, Job, interval, stem, why_kept

from dpopt.config.components import build, target_name
from dpopt.runs import provenance
from dpopt.runs.identity import content_key
from dpopt.runs.sweep import cost

RECORDED = ("test_accuracy", "test_loss", "epsilon", "optimizer_state_bytes", "peak_memory_bytes", "wall_seconds")
Cells = dict[tuple[str, str], list[Job]]


def show(measure: str, value: float) -> float:
    """A figure in the unit in which tables have it: per cent, bytes per parameter, MB, nats."""
    return value * 100 if "accuracy" in measure else value / 1e6 if measure == "peak_memory_bytes" else value


def unit(measure: str) -> str:
    """Name and unit of a measure."""
    known = {
        "test_accuracy": "Test accuracy in %",
        "test_loss": "Test loss in nats",
        "private/holdout_accuracy": "Accuracy in % on the hold-out",
        "optimizer_state_bytes": "Optimizer state in bytes",
        "peak_memory_bytes": "Peak memory in MB, of the GPU or of the whole process",
    }
    return known.get(measure, measure)


def digits(measure: str) -> int:
    """Decimals."""
    return {"test_loss": 3, "optimizer_state_bytes": 0, "peak_memory_bytes": 0}.get(measure, 1)


def cell(jobs: list[Job], measure: str) -> str:
    """Mean ± sd of the scores, and what is missing."""
    if not jobs:
        return ""
    results = [job.result() for job in jobs]
    scores = [show(measure, score) for job in jobs if (score := job.score(measure)) is not None]
    failed = [result["error"] for result in results if result["status"] == "failed"]
    if not scores:
        begun = "unfinished" if any(result["status"] == "unfinished" for result in results) else "not run"
        return f"failed: {failed[0][:70]}" if failed else begun
    if not all(map(math.isfinite, scores)):
        return f"diverged ({sum(not math.isfinite(score) for score in scores)} of {len(scores)})"
    places = digits(measure)
    text = f"{statistics.fmean(scores):,.{places}f}"
    text += f" ± {statistics.stdev(scores):.{places}f}" if len(scores) > 1 and places else ""
    notes = [f"n = {len(scores)}"] if places or len(scores) < len(jobs) else []
    notes += [f"{len(failed)} failed"] if failed else []
    return text + (f" ({', '.join(notes)})" if notes else "")


def difference(jobs: list[Job], base: list[Job], measure: str) -> str:
    """Mean of the differences of equal seeds, with its 95 % confidence interval."""
    of_base = {job.config.seed: job.score(measure) for job in base}
    pairs = [(job.score(measure), of_base.get(job.config.seed)) for job in jobs]
    found = [show(measure, one) - show(measure, other) for one, other in pairs if None not in (one, other)]  # type: ignore[arg-type]
    if not found or not all(map(math.isfinite, found)):
        return ""
    places = digits(measure)
    mean, half = interval(found)
    if math.isnan(half):
        return f"{mean:+.{places}f} (n = {len(found)}: no interval)"
    few = f" (n = {len(found)})" if len(found) < len(jobs) else ""
    return f"{mean:+.{places}f} [{bound(mean - half, places)}, {bound(mean + half, places)}]{few}"


def bound(value: float, places: int) -> str:
    """The end of an interval, with enough decimals to see on which side of 0 it lies."""
    while value and float(f"{value:.{places}f}") == 0 and places < 4:
        places += 1
    return f"{value:+.{places}f}"


def arrange(jobs: list[Job]) -> tuple[list[str], list[str], Cells]:
    """Rows, those that are numbers in their order, columns in the order of `COLUMNS`, and the runs of each cell."""
    rows = list(dict.fromkeys(job.row for job in jobs))
    with suppress(ValueError):
        rows = sorted(rows, key=float)
    columns = sorted({job.column for job in jobs}, key=lambda c: list(COLUMNS).index(c) if c in COLUMNS else 99)
    cells: Cells = {(row, column): [] for row in rows for column in columns}
    for job in jobs:
        if job.config.seed in [other.config.seed for other in cells[job.row, job.column]]:
            raise ValueError(f"two runs are row {job.row}, {job.column}, seed {job.config.seed}: give a row a label")
        cells[job.row, job.column].append(job)
    return rows, columns, cells


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def latex(caption: str, head: list[str], lines: list[list[str]]) -> str:
    """A LaTeX table, for booktabs."""

    signs = {"`": "", "_": r"\_", "%": r"\%", "±": r"$\pm$", "−": "$-$", "∞": r"$\infty$"}
    signs |= {"ε": r"$\varepsilon$", "δ": r"$\delta$"}

    def clean(text: str) -> str:
        for sign, word in signs.items():
            text = text.replace(sign, word)
        return text

    body = "\n".join("  " + " & ".join(map(clean, line)) + r" \\" for line in lines)
    return (
        f"\\begin{{table}}\n\\caption{{{clean(caption)}}}\n\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}\n\\toprule\n"
        f"  {' & '.join(map(clean, head))} \\\\\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n"
    )


def agrees(published: dict[str, Any], jobs: list[Job]) -> bool:
    """Whether data set, model, N, ε and δ of a published figure are those of our runs."""
    config = jobs[0].config
    train_size = build("dataset", config.dataset)().train_size
    ours = {
        "dataset": target_name(config.dataset),
        "model": target_name(config.model),
        "train_size": train_size - round(config.holdout * train_size),
        "epsilon": config.epsilon,
        "delta": config.delta if config.private else None,
    }
    return all(published[key] == value for key, value in ours.items())


def beside(published: list[dict[str, Any]], cells: Cells) -> list[list[str]]:
    """Published figures, ours, and the difference where the setting is the same."""
    lines = []
    for entry in published:
        jobs = cells.get((entry.get("row", ""), entry.get("column", "")), [])
        scores = [100 * score for job in jobs if (score := job.score("test_accuracy")) is not None]
        ours = cell(jobs, "test_accuracy") if jobs else "no such row"
        gap = "not run"
        if jobs and not agrees(entry, jobs):
            gap = "other setting"
        elif scores:
            gap = f"{statistics.fmean(scores) - entry['value']:+.1f}"
        what = f"{entry['what']} at ({entry['epsilon']}, {entry['delta']})" if entry["epsilon"] else entry["what"]
        lines.append([what, f"{entry['value']}", f"{entry['source']}: {entry['protocol']}", ours, gap if jobs else "–"])
    return lines


def flags(cells: Cells) -> list[str]:
    """What a reader must know of δ."""
    for jobs in cells.values():
        config = jobs[0].config if jobs else None
        if config and config.private:
            train_size = build("dataset", config.dataset)().train_size
            if config.delta * train_size > 1:
                return [f"δ = {config.delta:g} is above 1/N = {1 / train_size:.1g}: a guarantee in name only."]
    return []


def page(name: str, scale: str) -> tuple[str, str, list[dict[str, Any]]]:
    """All tables of experiments/NAME.yaml at a scale: Markdown, LaTeX, and their runs."""
    about = tables.read(name)
    parts, tex, runs = [f"# {about['title']}\n\n{about['setting'].strip()}\n"], [], []
    done, wanted = tables.finished(about, scale)
    if note := about.get("scale_notes", {}).get(scale):
        parts.append(f"Scale: {note.strip()}\n")
    for entry in about["tables"]:
        if not tables.rows_at(entry, scale):
            continue
        rows, columns, cells = arrange(tables.jobs(about, entry, scale))
        heads = [COLUMNS.get(column, f"{about['column']} = {column}") for column in columns]
        parts.append(f"## {entry['title']}\n")
        for measure in measures(about, entry):
            lines = [[f"`{row}`", *(cell(cells[row, column], measure) for column in columns)] for row in rows]
            parts.append(f"{unit(measure)}.\n\n{markdown(['', *heads], lines)}\n")
            tex.append(latex(f"{about['title']}: {entry['title']}. {unit(measure)}.", ["", *heads], lines))
            base = entry.get("baseline")
            if base in rows:
                compared = [
                    [f"`{row}`", *(difference(cells[row, c], cells[base, c], measure) for c in columns)]
                    for row in rows
                    if row != base
                ]
                parts.append(f"Difference to `{base}`, paired by seed, with 95 % intervals.\n")
                parts.append(markdown(["", *heads], compared) + "\n")
        if about.get("choose"):
            parts.append(f"{chosen(rows, columns, cells, about['measure'], about['choose'])}\n")
        if entry.get("published"):
            head = ["published", "%", "source: protocol", "ours", "Δ"]
            parts.append(markdown(head, beside(entry["published"], cells)) + "\n")
        told = [*flags(cells), entry.get("notes", "")]
        told += [entry.get("conclusions", {}).get(scale, "")] if done == wanted else []
        parts += [f"{text.strip()}\n" for text in told if text]
        made = [shlex.join(tables.overrides_of(about, entry, row, scale)) for row in tables.rows_at(entry, scale)]
        parts.append("Runs: " + ", ".join(f"`python run.py {words}`" for words in made) + ".\n")
        runs += [record(about, entry, job) for jobs in cells.values() for job in jobs]
    parts.append(foot(runs) + "\n")
    return "\n".join(parts), "\n".join(tex), runs


def measures(about: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    """What a table shows."""
    found: list[str] = entry.get("measures", [about.get("measure", "test_accuracy")])
    return found


def record(about: dict[str, Any], entry: dict[str, Any], job: Job) -> dict[str, Any]:
    """A run as a line of the csv file; a table by which something is chosen shows nothing of the test set."""
    title, result = entry["title"], job.result()
    shown = dict.fromkeys(m for part in about["tables"] for m in measures(about, part))
    recorded = [key for key in RECORDED if key not in shown and not (about.get("choose") and key.startswith("test_"))]
    which = {"table": title, "row": job.row, "column": job.column, "seed": job.config.seed, "status": result["status"]}
    scores = {measure: "" if (score := job.score(measure)) is None else score for measure in shown}
    keys = {key: result.get(key, "") for key in (*recorded, "git_commit", "device")}
    setting: dict[str, Any] = {"dataset": target_name(job.config.dataset), "model": target_name(job.config.model)}
    setting |= {"train_size": result.get("dataset_size", ""), "delta": job.config.delta if job.config.private else ""}
    versions = "; ".join(f"{key} {value}" for key, value in result.get("versions", {}).items())
    rest = {"versions": versions, "run": job.directory().name, "error": result.get("error", "")}
    return which | setting | scores | keys | rest


def foot(runs: list[dict[str, Any]]) -> str:
    """What has been run, where, with what."""
    once = {run["run"]: run for run in runs}.values()
    done = [run for run in once if run["status"] == "finished"]
    if not done:
        return f"None of {len(once)} runs has been made."
    hours = sum(run["wall_seconds"] for run in done) / 3600
    commits = sorted({provenance.short_commit(run["git_commit"]) for run in done})
    where = ", ".join(sorted({run["device"] for run in done}))
    versions = ", ".join(sorted({run["versions"] for run in done}))
    made = f"{len(done)} of {len(once)} runs, {hours:.1f} process hours"
    return f"{made}, on {where}; {versions}; commit {', '.join(commits)}."


def plan(name: str, scale: str) -> str:
    """What the runs of a table would cost here: every row planned once, without data."""
    from dpopt.training.run import run

    about = tables.read(name)
    found: dict[str, dict[str, Any]] = {}
    plans: dict[str, dict[str, Any]] = {}  # what differs by seed and ε alone takes the same time
    for entry in about["tables"]:
        for job in tables.jobs(about, entry, scale):
            config = replace(job.config, seed=0, dry_run=True)
            if config.epsilon and math.isfinite(config.epsilon):
                config = replace(config, epsilon=8.0)
            key = content_key(config)
            if key not in plans:
                plans[key] = run(config)
            found[str(job.directory())] = plans[key] | {"status": job.result()["status"]}
    expected = about.get("hours", {}).get(scale, {})
    hours = [f"expected hours on {hardware}: {hours}" for hardware, hours in expected.items()]
    return " · ".join([f"{name}, scale {scale}: {cost(list(found.values()))}", *hours])


def chosen(rows: list[str], columns: list[str], cells: Cells, measure: str, how: str) -> str:
    """The row that is best on average over the columns, or the one that is best in each of them."""

    def mean(row: str, column: str) -> float:
        scores = [job.score(measure) or 0.0 for job in cells[row, column]]
        return statistics.fmean(scores) if scores else 0.0

    if any(job.score(measure) is None for jobs in cells.values() for job in jobs):
        return "Not decided: runs are missing."
    if how == "average":
        return f"Best on average: {max(rows, key=lambda row: sum(mean(row, column) for column in columns))}."

    def best(column: str) -> str:
        return max(rows, key=lambda row: mean(row, column))

    return "Best: " + ", ".join(f"{best(column)} at {COLUMNS.get(column, column)}" for column in columns) + "."


def main() -> int:
    """Write the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(tables.names())}; all that the scale has")
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--output", type=Path, help="experiments/results, or runs/smoke for scale smoke")
    parser.add_argument("--commands", action="store_true", help="print the commands of runs that are missing")
    parser.add_argument("--force", action="store_true", help="overwrite tables that hold more runs than are here")
    parser.add_argument("--plan", action="store_true", help="print what the runs would cost, and stop")
    arguments = parser.parse_args()
    try:
        make(arguments)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def make(arguments: argparse.Namespace) -> None:
    """Print or write what is asked for.

    Raises:
        ValueError: when there is no such table, or not at this scale, or when two of its runs claim one place.
    """
    scale = arguments.scale
    asked = arguments.names or tables.names_at(scale)
    output = arguments.output or ROOT / ("runs/smoke" if scale == "smoke" else "experiments/results")
    for name in asked:
        tables.overlay(tables.read(name), scale)
    if arguments.commands:
        for line in dict.fromkeys(line for name in asked for line in tables.commands(name, scale)):
            print(line)
        return
    for name in asked:
        if arguments.plan:
            print(plan(name, scale))
            continue
        if not tables.read(name)["tables"]:
            continue  # a figure alone
        if not arguments.force and (why := why_kept(name, scale, output)):
            print(f"{why} (--force overwrites)")
            continue
        text, tex, runs = page(name, scale)
        output.mkdir(parents=True, exist_ok=True)
        path = output / f"{stem(name, scale)}.csv"
        path.with_suffix(".md").write_text(text)
        path.with_suffix(".tex").write_text(tex)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(runs[0]))
            writer.writeheader()
            writer.writerows(runs)
        print(text)


if __name__ == "__main__":
    sys.exit(main())
