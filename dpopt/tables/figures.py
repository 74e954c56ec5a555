"""Figures of results on disk: what experiments/NAME.yaml lists under `figures`.

Bands and bars are 95% confidence intervals of the mean over seeds (Student's t). A figure without any finished run is
not written. `convergence` needs no run: it computes its toy problem itself.
"""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import NullFormatter

import dpopt
from dpopt.config.components import component_name
from dpopt.runs.comparison import interval, show
from dpopt.tables import spec
from dpopt.tables.render import arrange
from dpopt.tables.spec import COLUMNS, SIZES, Job

# A method has one color and one marker in every figure; what else is drawn of it differs by its line. The first eight
# colors are Okabe and Ito's, told apart with any color vision.
STYLES = {
    "sgd": ("#0072B2", "o"),
    "adam": ("#D55E00", "s"),
    "microadam": ("#009E73", "D"),
    "adambc": ("#CC79A7", "^"),
    "adamstp": ("#E69F00", "v"),
    "adamw": ("#56B4E9", "P"),
    "signsgd": ("#000000", "*"),
    "adamwbc": ("#999999", "X"),
    "microadamstp": ("#882255", "d"),
    "lamb": ("#332288", "p"),
    "averagedsgd": ("#117733", "h"),
    "noisenormalizedsgd": ("#999933", "<"),
    "adammini": ("#CC6677", (6, 1, 0)),
    "mada": ("#AA4499", "H"),
    "fedsofim": ("#44AA99", "8"),
}
OTHER = ("#661100", ">")  # an optimizer of one's own
LINES = ["-", "--", ":", "-."]
INTERVAL = "mean and 95% interval over seeds"


def scores(jobs: list[Job], measure: str) -> list[float]:
    """Collect the numbers of finished runs, in the unit of the tables."""
    return [show(measure, score) for job in jobs if (score := job.score(measure)) is not None]


def style(drawn: Counter[str], method: str, label: str) -> dict[str, Any]:
    """Choose the color and marker of a method, and a line that no other of its lines in `drawn` has."""
    color, marker = STYLES.get(method, OTHER)
    line = LINES[drawn[color] % len(LINES)]
    drawn[color] += 1
    return {"color": color, "marker": marker, "linestyle": line, "label": label, "linewidth": 1.4}


def method_of(jobs: list[Job]) -> str:
    """Name the optimizer of some runs."""
    return component_name(jobs[0].config.optimizer)


def accuracy_label(halves: Sequence[float]) -> str:
    """Label the axis of accuracies; an interval is named where one is drawn."""
    drawn = any(math.isfinite(half) for half in halves)
    return f"test accuracy in %\n{INTERVAL if drawn else 'mean over seeds'}"


def by_epsilon(axis: Any, jobs: list[Job], about: dict[str, Any]) -> bool:
    """Plot accuracy against ε, a line per row."""
    rows, columns, cells = arrange(jobs)
    budgets = {job.column: float(job.config.epsilon or math.inf) for job in jobs if job.config.private}
    known = [column for column in columns if math.isfinite(budgets.get(column, math.inf))]
    drawn: Counter[str] = Counter()
    halves: list[float] = []
    for number, row in enumerate(rows):
        points = [(budgets[c], *interval(found)) for c in known if (found := scores(cells[row, c], "test_accuracy"))]
        if len(points) > 1:
            x, y, half = zip(*points, strict=True)
            shifted = [value * 1.012 ** (number - 3) for value in x]  # so that bars do not hide each other
            look = style(drawn, method_of([job for c in known for job in cells[row, c]]), row)
            axis.errorbar(shifted, y, half, markersize=5, capsize=2, **look)
            halves += half
    axis.set_xscale("log")
    axis.set_xticks([budgets[c] for c in known], [f"{budgets[c]:g}" for c in known])
    axis.minorticks_off()
    axis.set(xlabel="privacy budget ε", ylabel=accuracy_label(halves))
    return bool(drawn)


def curves(axis: Any, jobs: list[Job], about: dict[str, Any]) -> bool:
    """Plot a series of metrics.csv against steps, a line per row.

    The ε spent is a second axis where all rows share it.
    """
    key = about.get("series", "test/accuracy")
    rows, _, cells = arrange([job for job in jobs if job.column == about["column"]])
    spent: dict[float, float] = {}
    drawn: Counter[str] = Counter()
    shared, found = True, []
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
            look = style(drawn, method_of(cells[row, about["column"]]), row)
            axis.plot(list(points), means, markersize=4, **look)
            low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
            axis.fill_between(list(points), low, high, color=look["color"], alpha=0.15, linewidth=0)
            found += halves
    label = accuracy_label(found) if key == "test/accuracy" else about.get("label", key)
    axis.set(xlabel="step", ylabel=label)
    if about.get("log"):
        axis.set_yscale("log")
    if drawn and shared:
        _epsilon_axis(axis, spent)
    return bool(drawn)


def _epsilon_axis(axis: Any, spent: dict[float, float]) -> None:
    """Show the ε spent above the steps."""
    at = sorted(spent)
    ticks = [at[round(i * (len(at) - 1) / 4)] for i in range(5)] if len(at) > 6 else at
    top = axis.secondary_xaxis("top")
    top.set_xticks(ticks, [f"{spent[step]:.2g}" for step in ticks])
    top.set_xlabel("ε spent")


def ablation(axis: Any, jobs: list[Job], about: dict[str, Any]) -> bool:
    """Plot accuracy against a swept value, a line per column or prefix."""
    lines: dict[str, dict[float, list[Job]]] = {}
    for job in jobs:
        prefix, _, last = job.row.rpartition(", ")
        prefix = prefix.removeprefix("optimizer=")
        lines.setdefault(prefix or COLUMNS.get(job.column, job.column), {}).setdefault(
            float(last.rpartition("=")[2]), []
        ).append(job)
    drawn: Counter[str] = Counter()
    halves: list[float] = []
    for label, points in lines.items():
        found = [(x, *interval(s)) for x, some in sorted(points.items()) if (s := scores(some, "test_accuracy"))]
        if found:
            x, y, half = zip(*found, strict=True)
            look = style(drawn, method_of([job for some in points.values() for job in some]), label)
            axis.errorbar(x, y, half, markersize=5, capsize=3, **look)
            halves += half
    values = sorted({x for points in lines.values() for x in points})
    axis.set_xscale("log")
    axis.set_xticks(values, [f"{x:g}" for x in values], fontsize=7 if len(values) > 6 else None)
    axis.minorticks_off()
    axis.set(xlabel=about["label"], ylabel=accuracy_label(halves))
    return bool(drawn)


def bars(axis: Any, jobs: list[Job], about: dict[str, Any]) -> bool:
    """Plot bytes of optimizer state per trainable parameter, a bar per row."""
    rows, columns, cells = arrange(jobs)
    found, colors = {}, []
    for row in rows:
        results = [job.result() for column in columns for job in cells[row, column]]
        done = [r["optimizer_state_bytes"] / r["trainable_parameters"] for r in results if r["status"] == "finished"]
        if done:
            found[row] = statistics.fmean(done)
            colors.append(STYLES.get(method_of([job for c in columns for job in cells[row, c]]), OTHER)[0])
    axis.barh(list(found), list(found.values()), color=colors)
    for at, value in enumerate(found.values()):
        axis.annotate(f" {value:.2f}", (value, at), va="center", fontsize=9)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set(xlabel="optimizer state in bytes per parameter")
    return bool(found)


def convergence(axis: Any, jobs: list[Job], about: dict[str, Any]) -> bool:
    """Plot MicroAdam's mean squared gradient on a toy problem against T.

    f(x) = Σ x²/(1 + x²) over 1,024 coordinates that start in N(0, 4), lr = 0.2/√T; gradients have noise of their own
    size. The theory of 2405.15593 bounds the mean over steps by O(1/√T).
    """
    horizons = [2**i for i in range(5, 12)]
    drawn: Counter[str] = Counter()
    for name, make in _optimizers().items():
        means = [statistics.fmean(_mean_square_gradient(make, steps, seed) for seed in range(3)) for steps in horizons]
        axis.plot(horizons, means, markersize=5, **style(drawn, name.partition(",")[0].lower(), name))
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
        "MicroAdam, 1%, 4 bits": lambda p, lr: dpopt.optim.MicroAdam(p, lr=lr, density=0.01, dense_size=0),
        "MicroAdam, 10%, 4 bits": lambda p, lr: dpopt.optim.MicroAdam(p, lr=lr, density=0.1, dense_size=0),
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


KINDS = {"by_epsilon": by_epsilon, "curves": curves, "ablation": ablation, "bars": bars, "convergence": convergence}

OF_RUNS = ("curves", "bars")  # show more of a run than its page holds


def draw(name: str, size: str, output: Path = spec.RESULTS) -> list[Path]:
    """Draw every figure of experiments/NAME.yaml that has something to show."""
    about = spec.read(name)
    written = []
    for figure in about.get("figures", []):
        if size not in figure.get("sizes", SIZES):
            continue
        entries = [entry for entry in about["tables"] if entry["title"] == figure.get("table")]
        jobs = [job for entry in entries for job in spec.jobs(about, entry, size)]
        if figure["kind"] in OF_RUNS and any(job.on_page_alone() for job in jobs):
            print(f"{figure['name']}.png is kept as it is: some of its runs are on the page and not here")
            continue
        image, axis = plt.subplots(figsize=(6.2, 4.0), layout="constrained")
        if KINDS[figure["kind"]](axis, jobs, figure):
            settings = {(component_name(job.config.dataset), component_name(job.config.model)) for job in jobs}
            where = f" ({', '.join(*settings)})" if len(settings) == 1 else ""
            image.suptitle(figure["title"] + where, fontsize=10)
            if lines := len(axis.get_legend_handles_labels()[0]):
                image.legend(loc="outside lower center", ncols=min(4, lines), frameon=False, fontsize=8)
                image.set_figheight(4.0 + 0.22 * math.ceil(lines / 4))  # off the lines
            axis.spines[["right"]].set_visible(False)
            axis.grid(axis="x" if figure["kind"] == "bars" else "y", color="#E5E5E5", linewidth=0.7)
            axis.set_axisbelow(True)
            path = spec.folder(name, size, output) / f"{figure['name']}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.savefig(path, dpi=130)
            written.append(path)
        plt.close(image)
    return written
