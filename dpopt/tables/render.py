"""Pages of tables: Markdown, LaTeX and CSV from the results on disk; nothing is trained.

A cell is mean ± standard deviation over seeds, with the number of seeds. Missing and failed runs are named. Differences
to a table's baseline are paired by seed and have a 95% confidence interval (Student's t); a star marks those that hold
when corrected for their number. A published number has its source and protocol, and its difference to ours is given
only where dataset, model, N, ε and δ agree.
"""

import csv
import math
import statistics
from contextlib import suppress
from pathlib import Path
from typing import Any

from scipy.stats import ttest_1samp

from dpopt.config.components import component_name
from dpopt.runs import provenance
from dpopt.runs.comparison import bound, interval, show
from dpopt.tables import spec
from dpopt.tables.spec import COLUMNS, Job
from dpopt.training.build import make_task

RECORDED = ("test_accuracy", "test_loss", "epsilon", "optimizer_state_bytes", "peak_memory_bytes", "wall_seconds")
Cells = dict[tuple[str, str], list[Job]]


def unit(measure: str) -> str:
    """Name a measure and its unit."""
    known = {
        "test_accuracy": "Test accuracy in %",
        "test_loss": "Test loss in nats",
        "private/holdout_accuracy": "Accuracy in % on the hold-out",
        "optimizer_state_bytes": "Optimizer state in bytes",
        "peak_memory_bytes": "Peak memory in MB, of the GPU or of the whole process",
    }
    return known.get(measure, measure)


def digits(measure: str) -> int:
    """Choose the number of decimals."""
    digits = {"test_loss": 3, "epsilon": 3, "optimizer_state_bytes": 0, "peak_memory_bytes": 0}
    return digits.get(measure, 3 if measure.startswith("optimizer/") else 1)


def cell(jobs: list[Job], measure: str) -> str:
    """Write mean ± standard deviation, and what is missing."""
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


def pairs(jobs: list[Job], base: list[Job], measure: str) -> list[float]:
    """Subtract the baseline, seed by seed; only finished and finite pairs count."""
    of_base = {job.config.seed: job.score(measure) for job in base}
    both = [(job.score(measure), of_base.get(job.config.seed)) for job in jobs]
    return [show(measure, one) - show(measure, other) for one, other in both if None not in (one, other)]  # type: ignore[arg-type]


def difference(found: list[float], wanted: int, measure: str, holds: bool = False) -> str:
    """Average differences, with a 95% confidence interval; `holds` marks those that stay when corrected."""
    if not found or not all(map(math.isfinite, found)):
        return ""
    places = digits(measure)
    mean, half = interval(found)
    if math.isnan(half):
        return f"{mean:+.{places}f} (n = {len(found)}: no interval)"
    few = f" (n = {len(found)})" if len(found) < wanted else ""
    return f"{mean:+.{places}f} [{bound(mean - half, places)}, {bound(mean + half, places)}]{'*' * holds}{few}"


def differences(base: str, heads: dict[str, str], cells: Cells, measure: str) -> str:
    """Write the table of differences to a baseline, and say how many of them there are; "" before any pair has run.

    An interval leaves out 0 by chance in one of twenty cells without any difference. A star marks those that differ
    from 0 when all cells of the table may err once in twenty tables, by the method of Holm (1979).
    """
    others = [row for row in dict.fromkeys(row for row, _ in cells) if row != base]
    found = {(row, c): pairs(cells[row, c], cells[base, c], measure) for row in others for c in heads}
    others = [row for row in others if any(found[row, c] for c in heads)]
    if not others:
        return ""
    tested = {
        at: float(ttest_1samp(values, 0.0).pvalue)
        for at, values in found.items()
        if len(values) > 2 and all(map(math.isfinite, values)) and len(set(values)) > 1
    }
    marked = set()
    for rank, at in enumerate(sorted(tested, key=lambda at: tested[at])):
        if tested[at] > 0.05 / (len(tested) - rank):
            break
        marked.add(at)
    lines = [
        [f"`{row}`", *(difference(found[row, c], len(cells[row, c]), measure, (row, c) in marked) for c in heads)]
        for row in others
    ]
    told = f"Difference to `{base}`, paired by seed, with 95% intervals"
    told += f"; of these {len(tested)}, * holds for all together (Holm)" if len(tested) > 1 else ""
    return f"{told}.\n\n{markdown(['', *heads.values()], lines)}\n"


def arrange(jobs: list[Job]) -> tuple[list[str], list[str], Cells]:
    """Sort runs into rows, columns and cells.

    Rows that are all numbers are in their order, columns in that of `COLUMNS`, others as they are given.

    Raises:
        ValueError: when two runs claim one place.
    """
    rows = list(dict.fromkeys(job.row for job in jobs))
    with suppress(ValueError):
        rows = sorted(rows, key=float)
    columns = list(dict.fromkeys(job.column for job in jobs))
    columns.sort(key=lambda c: list(COLUMNS).index(c) if c in COLUMNS else len(COLUMNS))
    cells: Cells = {(row, column): [] for row in rows for column in columns}
    for job in jobs:
        if job.config.seed in [other.config.seed for other in cells[job.row, job.column]]:
            raise ValueError(f"two runs are row {job.row}, {job.column}, seed {job.config.seed}: give a row a label")
        cells[job.row, job.column].append(job)
    return rows, columns, cells


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """Write a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def latex(caption: str, head: list[str], lines: list[list[str]]) -> str:
    """Write a LaTeX table for booktabs."""

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
    """Check that a published number has our dataset, model, N, δ and ε, and what else it states of a plan.

    One that states its noise has it instead of ε, which depends on the accountant.
    """
    config = jobs[0].config
    train_size = make_task(config).spec.train_size
    ours = {
        "dataset": component_name(config.dataset),
        "model": component_name(config.model),
        "train_size": train_size - round(config.holdout * train_size),
        "epsilon": config.epsilon,
        "delta": config.delta if config.private else None,
    }
    plan = {key: getattr(config, key) for key in ("noise_multiplier", "batch_size", "steps") if key in published}
    if "noise_multiplier" in plan:
        del ours["epsilon"]
    return all(published[key] == value for key, value in (ours | plan).items())


def compare_published(published: list[dict[str, Any]], cells: Cells) -> list[list[str]]:
    """List published numbers, ours, and differences where the setting agrees."""
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


def flag_delta(cells: Cells) -> list[str]:
    """Flag a δ above 1/N."""
    for jobs in cells.values():
        config = jobs[0].config if jobs else None
        if config and config.private:
            train_size = make_task(config).spec.train_size
            if config.delta * train_size > 1:
                return [f"δ = {config.delta:g} is above 1/N = {1 / train_size:.1g}: a guarantee in name only."]
    return []


def page(name: str, size: str, output: Path = spec.RESULTS) -> tuple[str, str, list[dict[str, Any]]]:
    """Render all tables of experiments/NAME.yaml: Markdown, LaTeX, and their runs.

    Figures that lie in the page's folder below `output` are embedded.
    """
    about = spec.read(name)
    parts, tex, runs = [f"# {about['title']}\n\n{about['setting'].strip()}\n"], [], []
    done, wanted = spec.finished(about, size)
    if note := about.get("size_notes", {}).get(size):
        parts.append(f"Size {size}: {note.strip()}\n")
    for entry in about["tables"]:
        if not spec.rows_at(entry, size):
            continue
        rows, columns, cells = arrange(spec.jobs(about, entry, size))
        key = spec.column_key(about).replace("epsilon", "ε")
        heads = [COLUMNS.get(column, f"{key} = {column}") for column in columns]
        parts.append(f"## {entry['title']}\n")
        for measure in measures(about, entry):
            lines = [[f"`{row}`", *(cell(cells[row, column], measure) for column in columns)] for row in rows]
            spread = any(" ± " in text for line in lines for text in line[1:])
            told = unit(measure) + (", mean ± standard deviation over seeds" if spread else "")
            parts.append(f"{told}.\n\n{markdown(['', *heads], lines)}\n")
            tex.append(latex(f"{about['title']}: {entry['title']}. {told}.", ["", *heads], lines))
            named = dict(zip(columns, heads, strict=True))
            if (base := entry.get("baseline")) in rows and (paired := differences(base, named, cells, measure)):
                parts.append(paired)
        if about.get("choose"):
            parts.append(f"{chosen(rows, columns, cells, about['measure'], about['choose'])}\n")
        if entry.get("published"):
            head = ["published", "%", "source: protocol", "ours", "Δ"]
            parts.append(markdown(head, compare_published(entry["published"], cells)) + "\n")
        notes = [*flag_delta(cells), entry.get("notes", "")]
        notes += [entry.get("conclusions", {}).get(size, "")] if done == wanted else []
        parts += [f"{text.strip()}\n" for text in notes if text]
        parts += embedded(about, entry, spec.folder(name, size, output))
        made = [spec.command(spec.words_of(about, entry, row, size)) for row in spec.rows_at(entry, size)]
        parts.append("Runs: " + ", ".join(f"`{command}`" for command in made) + ".\n")
        runs += [record(about, entry, job) for jobs in cells.values() for job in jobs]
    parts.append(foot(runs) + "\n")
    return "\n".join(parts), "\n".join(tex), runs


def embedded(about: dict[str, Any], entry: dict[str, Any], folder: Path) -> list[str]:
    """Embed the figures of a table that lie in its folder."""
    found = [figure for figure in about.get("figures", []) if figure.get("table") == entry["title"]]
    return [f"![{f['title']}]({f['name']}.png)\n" for f in found if (folder / f"{f['name']}.png").exists()]


def write(name: str, size: str, output: Path = spec.RESULTS) -> str:
    """Write table.md, table.tex and table.csv into OUTPUT/NAME/SIZE; returns the page."""
    text, tex, runs = page(name, size, output)
    folder = spec.folder(name, size, output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text)
    (folder / "table.tex").write_text(tex)
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(runs[0]))
        writer.writeheader()
        writer.writerows(runs)
    return text


def measures(about: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    """List the measures that a table shows."""
    found: list[str] = entry.get("measures", [about.get("measure", "test_accuracy")])
    return found


def record(about: dict[str, Any], entry: dict[str, Any], job: Job) -> dict[str, Any]:
    """Turn a run into a line of the CSV file.

    A table by which something is chosen shows nothing of the test set.
    """
    title, result = entry["title"], job.result()
    shown = dict.fromkeys(m for part in about["tables"] for m in measures(about, part))
    recorded = [key for key in RECORDED if key not in shown and not (about.get("choose") and key.startswith("test_"))]
    which = {"table": title, "row": job.row, "column": job.column, "seed": job.config.seed, "status": result["status"]}
    scores = {measure: "" if (score := job.score(measure)) is None else score for measure in shown}
    keys = {key: result.get(key, "") for key in (*recorded, "git_commit", "device")}
    setting: dict[str, Any] = {"dataset": component_name(job.config.dataset), "model": component_name(job.config.model)}
    setting |= {"train_size": result.get("dataset_size", ""), "delta": job.config.delta if job.config.private else ""}
    versions = "; ".join(f"{key} {value}" for key, value in result.get("versions", {}).items())
    noise = result.get("noise_version", 1) if result["status"] == "finished" else ""
    rest = {"versions": versions, "noise_version": noise, "run": job.directory().name, "error": result.get("error", "")}
    return which | setting | scores | keys | rest


def foot(runs: list[dict[str, Any]]) -> str:
    """Sum up what was run, where, and with which versions."""
    once = {run["run"]: run for run in runs}.values()
    done = [run for run in once if run["status"] == "finished"]
    if not done:
        return f"None of {len(once)} runs has been made."
    hours = sum(run["wall_seconds"] for run in done) / 3600
    commits = sorted({provenance.short_commit(run["git_commit"]) for run in done})
    where = ", ".join(sorted({run["device"] for run in done}))
    versions = ", ".join(sorted({run["versions"] for run in done}))
    made = f"{len(done)} of {len(once)} runs, {hours:.1f} process hours"
    noise = ", ".join(sorted({str(run["noise_version"]) for run in done}))
    return f"{made}, on {where}; {versions}; noise version {noise}; commit {', '.join(commits)}."


def chosen(rows: list[str], columns: list[str], cells: Cells, measure: str, how: str) -> str:
    """Name the row that is best on average, or best in each column."""

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
