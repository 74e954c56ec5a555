"""Figures of what has been run, from the results on disk: what experiments/NAME.yaml lists under `figures`.

    python scripts/make_figures.py cifar10 --scale cpu     # → experiments/results/cifar10_cpu_accuracy.png, …

Bands and bars are 95 % confidence intervals of the mean over seeds (Student's t). A figure of which nothing has been
run is not written. `rate` needs no run: it computes its toy problem on the spot.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tables
import torch
from make_tables import arrange, show
from matplotlib.ticker import NullFormatter
from tables import COLUMNS, ROOT, SCALES, Job, interval, stem, why_kept

import dpopt
from dpopt.config.components import target_name

# Okabe and Ito's colours, told apart with any colour vision; lines also differ in their marker.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
MARKERS = "osD^vP*X"
EPSILON = {"eps1": 1, "eps3": 3, "eps8": 8}


def scores(jobs: list[Job], measure: str) -> list[float]:
    """The figures of the runs that are finished, in the unit of the tables."""
    return [show(measure, score) for job in jobs if (score := job.score(measure)) is not None]


def by_epsilon(axis: Any, jobs: list[Job], about: dict[str, Any]) -> bool:
    """Accuracy against ε, a line per row."""
    rows, columns, cells = arrange(jobs)
    known = [column for column in columns if column in EPSILON]
    drawn = 0
    for row in rows:
        points = [(EPSILON[c], *interval(found)) for c in known if (found := scores(cells[row, c], "test_accuracy"))]
        if len(points) > 1:
            x, y, half = zip(*points, strict=True)
            style = {"color": COLOURS[drawn % 8], "marker": MARKERS[drawn % 8], "label": row}
            shifted = [value * 1.012 ** (drawn - 3) for value in x]  # so that bars do not hide each other
            axis.errorbar(shifted, y, half, linewidth=1.4, markersize=5, capsize=2, **style)
            drawn += 1
    axis.set_xscale("log")
    axis.set_xticks([EPSILON[c] for c in known], [str(EPSILON[c]) for c in known])
    axis.minorticks_off()
    axis.set(xlabel="privacy budget ε", ylabel="test accuracy in %")
    return drawn > 0


def curves(axis: Any, jobs: list[Job], about: dict[str, Any]) -> bool:
    """A series of metrics.csv against steps, a line per row; the ε spent is a second axis, where all rows share it."""
    key = about.get("series", "test/accuracy")
    rows, _, cells = arrange([job for job in jobs if job.column == about["column"]])
    spent: dict[float, float] = {}
    shared, drawn = True, 0
    for row in about.get("rows", rows):
        points: dict[float, list[float]] = {}
        for job in cells.get((row, about["column"]), []):
            for line in job.series() if job.result()["status"] == "finished" else []:
                if key in line:
                    step, epsilon = line["step"], line["privacy/epsilon"]
                    points.setdefault(step, []).append(show(key, line[key]))
                    shared &= math.isclose(spent.setdefault(step, epsilon), epsilon)
        if points:
            points = dict(sorted(points.items()))
            means, halves = map(list, zip(*map(interval, points.values()), strict=True))
            axis.plot(list(points), means, color=COLOURS[drawn % 8], marker=MARKERS[drawn % 8], markersize=4, label=row)
            low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
            axis.fill_between(list(points), low, high, color=COLOURS[drawn % 8], alpha=0.15, linewidth=0)
            drawn += 1
    axis.set(xlabel="step", ylabel={"test/accuracy": "test accuracy in %"}.get(key, about.get("label", key)))
    if about.get("log"):
        axis.set_yscale("log")
    if drawn and shared:
        at = sorted(spent)
        ticks = [at[round(i * (len(at) - 1) / 4)] for i in range(5)] if len(at) > 6 else at
        top = axis.secondary_xaxis("top")
        top.set_xticks(ticks, [f"{spent[step]:.2g}" for step in ticks])
        top.set_xlabel("ε spent")
    return drawn > 0


def ablation(axis: Any, jobs: list[Job], about: dict[str, Any]) -> bool:
    """Accuracy against the value that a preset sweeps, a line per column, or per row prefix."""
    lines: dict[str, dict[float, list[Job]]] = {}
    for job in jobs:
        prefix, _, last = job.row.rpartition(", ")
        prefix = prefix.removeprefix("optimizer=")
        lines.setdefault(prefix or COLUMNS.get(job.column, job.column), {}).setdefault(
            float(last.rpartition("=")[2]), []
        ).append(job)
    drawn = 0
    for label, points in lines.items():
        found = [(x, *interval(s)) for x, some in sorted(points.items()) if (s := scores(some, "test_accuracy"))]
        if found:
            x, y, half = zip(*found, strict=True)
            style = {"color": COLOURS[drawn % 8], "marker": MARKERS[drawn % 8], "label": label}
            axis.errorbar(x, y, half, linewidth=1.4, markersize=5, capsize=3, **style)
            drawn += 1
    values = sorted({x for points in lines.values() for x in points})
    axis.set_xscale("log")
    axis.set_xticks(values, [f"{x:g}" for x in values], fontsize=7 if len(values) > 6 else None)
    axis.minorticks_off()
    axis.set(xlabel=about["label"], ylabel="test accuracy in %")
    return drawn > 0


def bars(axis: Any, jobs: list[Job], about: dict[str, Any]) -> bool:
    """Bytes of optimizer state per trainable parameter, a bar per row."""
    rows, columns, cells = arrange(jobs)
    found = {}
    for row in rows:
        results = [job.result() for column in columns for job in cells[row, column]]
        done = [r["optimizer_state_bytes"] / r["trainable_parameters"] for r in results if r["status"] == "finished"]
        if done:
            found[row] = statistics.fmean(done)
    ours = ["microadam" in row for row in found]
    axis.barh(list(found), list(found.values()), color=[COLOURS[0] if o else "#BBBBBB" for o in ours])
    for at, value in enumerate(found.values()):
        axis.annotate(f" {value:.2f}", (value, at), va="center", fontsize=9)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set(xlabel="optimizer state in bytes per parameter")
    return bool(found)


def rate(axis: Any, jobs: list[Job], about: dict[str, Any]) -> bool:
    """The mean squared gradient of MicroAdam on a smooth, non-convex sum, with noise, against T, for lr = .2/√T.

    f(x) = Σ x²/(1 + x²) over 1,024 coordinates that start in N(0, 4); gradients have noise of their own size. The
    theory of 2405.15593 bounds the mean over steps by O(1/√T).
    """
    horizons = [2**i for i in range(5, 12)]
    for drawn, (name, make) in enumerate(_optimizers().items()):
        means = [statistics.fmean(_mean_square_gradient(make, steps, seed) for seed in range(3)) for steps in horizons]
        axis.plot(horizons, means, color=COLOURS[drawn], marker=MARKERS[drawn], markersize=5, label=name)
    guide = [means[-1] * math.sqrt(horizons[-1] / horizon) for horizon in horizons]
    axis.plot(horizons, guide, color="black", linestyle="--", linewidth=1, label="1/√T")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylim(0.05, 1.5)
    axis.set(xlabel="number of steps T", ylabel="mean over steps of |∇f|² / |∇f(x₀)|²")
    return True


def _optimizers() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    return {
        "MicroAdam, 1 %, 4 bits": lambda p, lr: dpopt.optim.MicroAdam(p, lr=lr, density=0.01, dense_size=0),
        "MicroAdam, 10 %, 4 bits": lambda p, lr: dpopt.optim.MicroAdam(p, lr=lr, density=0.1, dense_size=0),
        "Adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
    }


def _mean_square_gradient(make: Callable[..., torch.optim.Optimizer], horizon: int, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    x = torch.nn.Parameter(2 * torch.randn(1024, generator=generator))
    optimizer = make([x], 0.2 / math.sqrt(horizon))
    total = first = 0.0
    for _ in range(horizon):
        exact = 2 * x.detach() / (1 + x.detach().square()).square()
        square = float(exact.square().sum())
        total, first = total + square, first or square
        x.grad = exact + exact.square().mean().sqrt() * torch.randn(1024, generator=generator)
        optimizer.step()
    return total / horizon / first


KINDS = {"by_epsilon": by_epsilon, "curves": curves, "ablation": ablation, "bars": bars, "rate": rate}


def draw(name: str, scale: str, output: Path) -> list[Path]:
    """Every figure of experiments/NAME.yaml for which there is something to show."""
    about = tables.read(name)
    written = []
    for figure in about.get("figures", []):
        if scale not in figure.get("scales", SCALES):
            continue
        entries = [entry for entry in about["tables"] if entry["title"] == figure.get("table")]
        jobs = [job for entry in entries for job in tables.jobs(about, entry, scale)]
        image, axis = plt.subplots(figsize=(6.2, 4.0), layout="constrained")
        if KINDS[figure["kind"]](axis, jobs, figure):
            settings = {(target_name(job.config.dataset), target_name(job.config.model)) for job in jobs}
            where = f" ({', '.join(*settings)})" if len(settings) == 1 else ""
            image.suptitle(figure["title"] + where, fontsize=10)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(frameon=False, fontsize=8)
            axis.spines[["right"]].set_visible(False)
            axis.grid(axis="x" if figure["kind"] == "bars" else "y", color="#E5E5E5", linewidth=0.7)
            axis.set_axisbelow(True)
            path = output / f"{stem(name, scale)}_{figure['name']}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.savefig(path, dpi=130)
            written.append(path)
        plt.close(image)
    return written


def main() -> int:
    """Draw what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(tables.names())}; all that the scale has")
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--output", type=Path, help="experiments/results, or runs/smoke for scale smoke")
    arguments = parser.parse_args()
    output = arguments.output or ROOT / ("runs/smoke" if arguments.scale == "smoke" else "experiments/results")
    for name in arguments.names or tables.names_at(arguments.scale):
        if why := why_kept(name, arguments.scale, output):
            print(f"{why}, and so are its figures (draw them to another folder with --output)")
            continue
        for path in draw(name, arguments.scale, output):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
