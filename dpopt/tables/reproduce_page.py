"""The page docs/reproduce.md: every table, its command, what was published, and our results."""

import statistics
from typing import Any

from dpopt.tables import spec
from dpopt.tables.render import agrees, arrange
from dpopt.tables.spec import COLUMNS

LINK = "../experiments/results"
INTRODUCTION = """\
# Reproduce

A table is one command: it runs what is missing, resumes what was interrupted, and writes Markdown, LaTeX, CSV and
figures into `experiments/results/NAME/SIZE/`. `SIZE=cpu` is real data on two cores, `SIZE=full` the paper's setting on
a GPU, `SIZE=smoke` two steps of every row, to see that everything runs. `python scripts/make_reproduce.py` makes this
page from `experiments/*.yaml` and the committed results.

- `make plan-NAME SIZE=full` estimates a table on this machine: runs, time, memory. Nothing is trained.
- `make table-NAME JOBS=4` runs four processes at once; several GPUs take turns. It prints runs done, all runs, and the
  time left.
- The command of each row stands below its table, for example `python run.py -m experiment=quickstart
  'optimizer=glob(*)' seed=0,1`. In parallel, add `hydra/launcher=joblib hydra.launcher.n_jobs=4`; on a SLURM cluster,
  `hydra/launcher=slurm hydra.launcher.partition=NAME` ([several devices](several_devices.md);
  `pip install -e .[sweeps]`).
- A run that fails does not stop the others; the table shows its error. `Ctrl-C` loses at most the steps since the last
  checkpoint, and the same command resumes.
- `dpopt table NAME --run --add` goes on where another machine stopped: the runs of the committed page count, and
  only what it lacks is run and added to it.
- `make rerun RUN=runs/…/NAME` trains a run again from the configuration that it recorded and says whether it agrees.

A table of your own is one file, `experiments/mine.yaml`:

```yaml
title: Mine
setting: What a reader must know.
base: experiment=quickstart                    # the words of every run, as after `python run.py -m`
sizes:                                         # more words by size; the last of two words with one key counts
  smoke: size=smoke privacy=eps8 seed=0
  full: eval_every=300 privacy=eps1,eps8 seed=0,1,2
hours: {full: {one GPU: "3"}}                  # what to expect, by hardware
tables:
  - title: Accuracy
    baseline: dp_sgd
    runs: optimizer=dp_sgd,dp_adam             # the words of a table; what varies besides privacy and seed is a row
    rows:
      - {}
      - {label: "dp_adam, small rate", runs: optimizer=dp_adam optimizer.lr=1e-4, sizes: [full]}
    conclusions: {full: What it shows.}        # printed below the table once all its runs are there
```

Then `make table-mine SIZE=full`. A published number has source and protocol, and is compared with ours only where
dataset, model, N, ε and δ are the same.

"""


def ours(name: str, size: str, part: dict[str, Any], entry: dict[str, Any]) -> str:
    """Write our result in the cell of a published number, and whether settings agree."""
    cell = entry.get("row", ""), entry.get("column", "")
    runs = [run for run in spec.recorded(name, size) if run["table"] == part["title"]]
    chosen = [run for run in runs if (run["row"], run["column"]) == cell]
    found = [100 * float(run["test_accuracy"]) for run in {run["run"]: run for run in chosen}.values()]
    if not found:
        return "not run"
    spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
    same = agrees(entry, arrange(spec.jobs(spec.read(name), part, size))[2][cell])
    return f"{statistics.fmean(found):.1f}{spread} (n = {len(found)}{'' if same else ', other setting'})"


def section(name: str) -> str:
    """Write a table's part of the page."""
    about = spec.read(name)
    sizes = [size for size in about["sizes"] if size != "smoke"]
    lines = [f"## {about['title']}\n"]
    for size in sizes:
        lines += status(name, size)
    published = [(part, entry) for part in about["tables"] for entry in part.get("published", [])]
    if published:
        lines.append(f"\n| published | % | source: protocol | {' | '.join(f'ours, {size}' for size in sizes)} |")
        lines.append("|---" * (3 + len(sizes)) + "|")
        for part, entry in published:
            what = f"{entry['what']}, {COLUMNS.get(entry.get('column', ''), '')}"
            cells = [ours(name, size, part, entry) for size in sizes]
            lines.append(
                f"| {what} | {entry['value']} | {entry['source']}: {entry['protocol']} | {' | '.join(cells)} |"
            )
    return "\n".join(lines) + "\n"


def status(name: str, size: str) -> list[str]:
    """List a table's command at a size, its page, cost and figures."""
    about, runs, folder = spec.read(name), spec.recorded(name, size), spec.folder(name, size)
    once = {run["run"]: run for run in runs}.values()
    hours = sum(float(run["wall_seconds"]) for run in once) / 3600
    where = ", ".join(sorted({run["device"] for run in runs}))
    noise = ", ".join(sorted({str(run.get("noise_version", 1)) for run in runs}))
    missing = "not run" if about["tables"] else "a figure, no table"
    page = folder / "table.md"
    done = f"[{name}/{size}/{page.name}]({LINK}/{name}/{size}/{page.name})" if page.exists() else missing
    cost = f", {len(once)} runs, {hours:.1f} process hours on {where}, noise version {noise}" if runs else ""
    expected = [f"; expected hours on {on}: {h}" for on, h in about.get("hours", {}).get(size, {}).items()]
    lines = [f"- `make table-{name} SIZE={size}`: {done}{cost}{''.join(expected)}"]
    for figure in sorted(figure["name"] for figure in about.get("figures", [])):
        if (folder / f"{figure}.png").exists():
            lines.append(f"  - figure [{figure}.png]({LINK}/{name}/{size}/{figure}.png)")
    return lines


def page() -> str:
    """Write the whole page."""
    return "\n".join([INTRODUCTION, *map(section, spec.names())])
