"""The page docs/reproduce.md: every table, the command that makes it, what was published, what came out here.

python scripts/make_reproduce.py      # from experiments/*.yaml and the csv files in experiments/results/
"""

import csv
import statistics
from pathlib import Path
from typing import Any

import tables
from make_tables import agrees, arrange
from tables import COLUMNS, ROOT, stem

RESULTS = ROOT / "experiments" / "results"
INTRODUCTION = """\
# Reproduce

A table is one command: it runs what is missing, goes on where it was interrupted, and writes Markdown, LaTeX, CSV and
figures. `SCALE=cpu` is real data on two cores, `SCALE=full` the paper's setting on a GPU, `SCALE=smoke` two steps of
every row, to see that everything runs. This page is made by `python scripts/make_reproduce.py` from
`experiments/*.yaml` and the committed results.

- `make plan-NAME SCALE=full` prints what a table would cost on this machine: runs, time, memory. Nothing is trained.
- `make table-NAME JOBS=4` runs four processes at once; where there are several GPUs they take turns. One preset alone
  is `python run.py experiment=table_cifar10`; in parallel, add `hydra/launcher=joblib hydra.launcher.n_jobs=4`; on a
  SLURM cluster, `hydra/launcher=submitit_slurm hydra.launcher.partition=NAME hydra.launcher.gpus_per_node=1`
  (`pip install -e .[sweeps]`).
- A run that fails does not stop the others; the table shows its error. `Ctrl-C` loses at most the steps since the last
  checkpoint of the runs in hand, and the same command goes on.
- `make rerun RUN=runs/…/NAME` trains a run again from the configuration that it recorded and says whether it agrees.

A table of your own is a preset that sweeps, `conf/experiment/table_mine.yaml`, written like
[table_digits_clipping.yaml](../conf/experiment/table_digits_clipping.yaml), and `experiments/mine.yaml`, that names it:

```yaml
title: Mine
setting: What a reader must know.
column: privacy
scales: [smoke, full]            # the last one is the presets as they stand; the others lay conf/size/ over them
hours: {full: {one GPU: "3"}}    # what to expect, by hardware
tables:
  - title: Accuracy
    baseline: dp_sgd
    rows: [{preset: table_mine}]
    conclusions: {full: What it shows.}    # printed below the table once all its runs are there
```

Then `make table-mine SCALE=full`. A published figure names source and protocol, and is compared with ours only where
data set, model, N, ε and δ are the same.

"""


def results(name: str, scale: str) -> list[dict[str, str]]:
    """The committed runs of a table."""
    path = RESULTS / f"{stem(name, scale)}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [run for run in csv.DictReader(file) if run["status"] == "finished"]


def ours(name: str, scale: str, part: dict[str, Any], entry: dict[str, Any]) -> str:
    """What came out in the cell of a published figure, and whether the setting is the same."""
    cell = entry.get("row", ""), entry.get("column", "")
    runs = [run for run in results(name, scale) if run["table"] == part["title"]]
    chosen = [run for run in runs if (run["row"], run["column"]) == cell]
    found = [100 * float(run["test_accuracy"]) for run in {run["run"]: run for run in chosen}.values()]
    if not found:
        return "not run"
    spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
    same = agrees(entry, arrange(tables.jobs(tables.read(name), part, scale))[2][cell])
    return f"{statistics.fmean(found):.1f}{spread} (n = {len(found)}{'' if same else ', other setting'})"


def section(name: str) -> str:
    """A table's part of the page."""
    about = tables.read(name)
    lines = [f"## {about['title']}\n"]
    for scale in about["scales"]:
        if scale == "smoke":
            continue
        runs = results(name, scale)
        path = RESULTS / f"{stem(name, scale)}.md"
        once = {run["run"]: run for run in runs}.values()
        hours = sum(float(run["wall_seconds"]) for run in once) / 3600
        where = ", ".join(sorted({run["device"] for run in runs}))
        missing = "not run" if about["tables"] else "a figure, no table"
        done = f"[{path.name}](../experiments/results/{path.name})" if path.exists() else missing
        cost = f", {len(once)} runs, {hours:.1f} process hours on {where}" if runs else ""
        expected = [f"; expected hours on {on}: {h}" for on, h in about.get("hours", {}).get(scale, {}).items()]
        lines.append(f"- `make table-{name} SCALE={scale}`: {done}{cost}{''.join(expected)}")
        for figure in sorted(RESULTS.glob(f"{stem(name, scale)}_*.png")):
            if figure.stem.removeprefix(f"{stem(name, scale)}_") in {f["name"] for f in about.get("figures", [])}:
                lines.append(f"  - figure [{figure.name}](../experiments/results/{figure.name})")
    published = [(part, entry) for part in about["tables"] for entry in part.get("published", [])]
    scales = [scale for scale in about["scales"] if scale != "smoke"]
    if published:
        lines.append(f"\n| published | % | source: protocol | {' | '.join(f'ours, {scale}' for scale in scales)} |")
        lines.append("|---" * (3 + len(scales)) + "|")
        for part, entry in published:
            what = f"{entry['what']}, {COLUMNS.get(entry.get('column', ''), '')}"
            cells = [ours(name, scale, part, entry) for scale in scales]
            lines.append(
                f"| {what} | {entry['value']} | {entry['source']}: {entry['protocol']} | {' | '.join(cells)} |"
            )
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *map(section, tables.names())])


if __name__ == "__main__":
    Path(ROOT / "docs" / "reproduce.md").write_text(page())
