"""Tabulate the noise multiplier σ for a target ε, or ε for a given σ, over batch sizes and epochs.

dpopt budget --size 50000 --delta 1e-5 --epsilon 8 --batch 256,512,1024,2048,4096 --epochs 5,10,20,50,100
dpopt budget --size 50000 --delta 1e-5 --sigma 1.5 --batch 256,1024,4096 --epochs 10,30,100

It prints a table and draws it as a heat map, budget.png. The accountant is PLD, the sampling Poisson, and neighboring
datasets differ by one example added or removed. Every value is within 0.1% of what a run computes for itself; that one
counts. A batch is the expected one.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from dpopt.cli import verb_parser

Grid = list[list[float]]  # a row per batch size, a column per number of epochs


def budget(words: Sequence[str]) -> int:
    """Print the table and draw the heat map; return the exit code."""
    arguments = _parser().parse_args(words)
    grid = values(arguments)
    title, symbol = _title(arguments)
    show(grid, arguments.batch, arguments.epochs, title)
    draw(grid, arguments, title, symbol)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = verb_parser("budget", __doc__)
    parser.add_argument("--size", type=int, required=True, help="N, the number of training examples")
    parser.add_argument("--delta", type=float, required=True, help="δ, below 1/N")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--epsilon", type=float, help="the target ε: print σ")
    given.add_argument("--sigma", type=float, help="the noise multiplier σ: print ε")
    parser.add_argument("--batch", type=_numbers(int), required=True, help="batch sizes, with commas")
    parser.add_argument("--epochs", type=_numbers(float), required=True, help="epochs, with commas")
    parser.add_argument("-o", "--output", type=Path, default=Path("budget.png"), help="of the heat map")
    parser.add_argument("--allow-large-delta", action="store_true", help="accept a δ of 1/N or more")
    return parser


def _numbers(kind: type) -> Callable[[str], list[float]]:
    """Make a reader of numbers with commas between them."""

    def numbers(text: str) -> list[float]:
        return [kind(word) for word in text.split(",")]

    return numbers


def values(arguments: argparse.Namespace) -> Grid:
    """Compute σ, or ε, for every batch size and number of epochs.

    Raises:
        ValueError: for a budget that no plan can have.
    """
    from dpopt.privacy.plan import PrivacyPlan
    from dpopt.privacy.quick import quick_epsilon, quick_noise

    size, delta, epsilon = arguments.size, arguments.delta, arguments.epsilon
    _check("epsilon", epsilon)
    _check("sigma", arguments.sigma)
    for count in arguments.epochs:
        _check("epochs", count)
    rows = []
    for batch in arguments.batch:
        row = []
        for epochs in arguments.epochs:
            sigma = arguments.sigma or 1.0
            steps = max(1, round(epochs * size / batch)) if batch > 0 else 1
            # A plan refuses what a run would refuse.
            plan = PrivacyPlan(sigma, size, batch, steps, delta, allow_large_delta=arguments.allow_large_delta)
            given = (plan.sample_rate, plan.steps, plan.delta)
            row.append(quick_epsilon(sigma, *given) if epsilon is None else quick_noise(epsilon, *given))
        rows.append(row)
    return rows


def _check(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < float("inf"):
        raise ValueError(f"{name}={value:g} must be a positive number: only then is there a budget to tabulate")


def _title(arguments: argparse.Namespace) -> tuple[str, str]:
    """Say what the table shows, and name its symbol."""
    setting = f"N = {arguments.size:,}, δ = {arguments.delta:g}"
    if arguments.epsilon is None:
        return f"ε for σ = {arguments.sigma:g}, {setting}", "ε"
    return f"noise multiplier σ for ε = {arguments.epsilon:g}, {setting}", "noise multiplier σ"


def show(grid: Grid, batches: list[int], epochs: list[float], title: str) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("batch size, epochs:", justify="right", style="bold")
    for count in epochs:
        table.add_column(f"{count:g}", justify="right", no_wrap=True)
    for batch, row in zip(batches, grid, strict=True):
        table.add_row(f"{batch:,}", *map(_digits, row))
    plain = Console()
    plain = plain if plain.is_terminal else Console(width=max(100, 12 * (len(epochs) + 2)))
    plain.print(title, highlight=False, soft_wrap=True)
    plain.print(table)


def _digits(value: float, count: int = 4) -> str:
    """Write so many digits, without an exponent where that is short: four of a half are 0.5000."""
    return f"{value:#.{count}g}".rstrip(".") if 1e-4 < value < 1e4 else f"{value:.{count - 1}e}"


def draw(grid: Grid, arguments: argparse.Namespace, title: str, symbol: str) -> None:
    """Draw the heat map, with a value in each cell."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    from dpopt import files

    rows, columns = len(grid), len(grid[0])
    size = (max(5.2, 0.72 * columns + 2.6), max(3.2, 0.42 * rows + 1.5))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    flat = [value for row in grid for value in row if value > 0] or [1.0]  # an ε can be 0
    low, high = min(flat), max(flat)
    norm = LogNorm(low, max(high, low * 1.01), clip=True)
    image = axis.imshow([[max(value, low) for value in row] for row in grid], cmap="viridis", norm=norm, aspect="auto")
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            color = "white" if norm(max(value, low)) < 0.55 else "black"
            axis.text(x, y, _digits(value, 3), ha="center", va="center", color=color, fontsize=9)
    axis.set_xticks(range(columns), [f"{count:g}" for count in arguments.epochs])
    axis.set_yticks(range(rows), [f"{batch:,}" for batch in arguments.batch])
    axis.set(xlabel="epochs", ylabel="expected batch size")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=10)
    bar = figure.colorbar(image, label=f"{symbol} (log scale)")
    ticks = sorted({low, (low * high) ** 0.5, high})
    bar.set_ticks(ticks, labels=[_digits(tick, 3) for tick in ticks])
    bar.minorticks_off()
    bar.outline.set_visible(False)
    with files.writing(arguments.output):
        figure.savefig(arguments.output, dpi=130)
    plt.close(figure)
    print(f"wrote {arguments.output}")
