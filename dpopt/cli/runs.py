"""List and compare finished runs, from their result.json and metrics.csv.

dpopt runs list 'runs/*'                     a line per run
dpopt runs compare 'runs/*adam*' 'runs/*sgd*'   mean ± standard deviation per group
dpopt runs curves 'runs/*' -o curves.png     test accuracy against steps, a line per group

Runs that differ only in their seed make a group. For groups that share seeds with the first one, compare gives the
paired difference, with its 95% interval (Student's t; from three values on). A glob names run directories or folders
of them. To choose hyper-parameters, take --measure private/holdout_accuracy: a choice by the test set uses it up.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpopt.cli import verb_parser

if TYPE_CHECKING:
    from dpopt.runs.comparison import FinishedRun, Group


def runs(words: Sequence[str]) -> int:
    """List runs, compare groups of them, or draw their curves; return the exit code."""
    parser = verb_parser("runs", __doc__)
    parser.add_argument("what", choices=("list", "compare", "curves"))
    parser.add_argument("globs", nargs="+", metavar="GLOB", help="run directories, or folders of them")
    parser.add_argument("--measure", default="test_accuracy", help="a key of result.json (default: test_accuracy)")
    parser.add_argument("-o", "--output", type=Path, default=Path("curves.png"), help="of the curves")
    arguments = parser.parse_args(words)
    from dpopt.runs.comparison import find_runs, group_runs, summarize, table

    found, others = find_runs(arguments.globs)
    if arguments.what == "list":
        _print(*overview(found, arguments.measure))
    elif arguments.what == "compare":
        _print(*table(summarize(group_runs(found), arguments.measure), arguments.measure))
    else:
        draw(group_runs(found), arguments.measure, arguments.output)
        print(f"wrote {arguments.output}")
    if others:
        print(f"left out, because they are not finished: {', '.join(path.name for path in others)}", file=sys.stderr)
    return 0


def overview(found: "Sequence[FinishedRun]", measure: str) -> tuple[list[str], list[list[str]]]:
    """Write the head and a line per run."""
    from dpopt.runs.comparison import show

    unit = " in %" if "accuracy" in measure else ""
    lines = [
        [
            run.directory.name,
            f"{show(measure, run.score(measure)):.{2 if unit else 4}f}",
            f"{run.score('epsilon'):.4g}".replace("inf", "∞"),
            f"{run.score('steps'):,.0f}",
            f"{run.score('wall_seconds'):,.0f}",
        ]
        for run in found
    ]
    return ["run", f"{measure}{unit}", "ε", "steps", "seconds"], lines


def _print(head: list[str], lines: list[list[str]]) -> None:
    """Print a table: at the width of a terminal, unwrapped elsewhere."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(head):
        grid.add_column(Text(name), justify="right" if number else "left", overflow="fold")
    for line in lines:
        grid.add_row(*map(Text, line))  # as it is: brackets are no markup
    plain = Console()
    (plain if plain.is_terminal else Console(width=10_000)).print(grid)


def draw(groups: "Sequence[Group]", measure: str, output: Path) -> None:
    """Draw a line per group: the mean over its seeds, in a band of one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    import math

    import matplotlib.pyplot as plt

    from dpopt import files
    from dpopt.runs.comparison import COLORS, curve

    figure, axis = plt.subplots(figsize=(7.2, 4.2 + 0.2 * len(groups)), layout="constrained")
    for number, group in enumerate(groups):
        steps, means, deviations = zip(*curve(group, measure), strict=True)
        color, line = COLORS[number % len(COLORS)], ("-", "--", ":", "-.")[number // len(COLORS) % 4]
        count = len(group.runs)
        told = f"mean ± sd of {count} seeds" if count > 1 else "one run"
        label = f"{group.label} ({told})".replace("$", r"\$")
        axis.plot(steps, means, color=color, linestyle=line, marker="o", markersize=3, linewidth=1.4, label=label)
        if all(map(math.isfinite, deviations)):
            low, high = ([m + s * d for m, d in zip(means, deviations, strict=True)] for s in (-1, 1))
            axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    axis.set(xlabel="step", ylabel=f"{measure.replace('_', ' ')}{' in %' if 'accuracy' in measure else ''}")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#E5E5E5", linewidth=0.7)
    axis.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=8)
    with files.writing(output):
        figure.savefig(output, dpi=130)
    plt.close(figure)
