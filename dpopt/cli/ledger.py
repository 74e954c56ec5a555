"""Show what private runs have spent together on each dataset.

dpopt ledger
dpopt ledger --delta 1e-5 --runs
"""

from collections.abc import Sequence

from dpopt.cli import verb_parser


def ledger(words: Sequence[str]) -> int:
    """Compose the runs on each dataset and print the totals; return the exit code."""
    parser = verb_parser("ledger", __doc__)
    parser.add_argument("--delta", type=float, help="δ of all runs together; by default the largest of the runs")
    parser.add_argument("--runs", action="store_true", help="list the runs, too")
    arguments = parser.parse_args(words)
    print(overview(arguments.delta, arguments.runs))
    return 0


def overview(delta: float | None, list_runs: bool) -> str:
    """Write a line per dataset: its runs, and the ε of all of them together."""
    from dpopt.data.fingerprint import home
    from dpopt.runs.ledger import Ledger, by_data, total_epsilon
    from dpopt.runs.search import CHOICE

    book = Ledger(home())
    runs = book.runs()
    if not runs:
        return f"{book.path} holds no private run"
    lines = [f"{book.path}: {len(runs)} private runs"]
    for (_, data), group in by_data(runs).items():
        at = max(run.delta for run in group) if delta is None else delta
        names = ", ".join(dict.fromkeys(run.dataset for run in group))
        lines.append(
            f"{names} ({data[:12]}): {len(group)} runs, together ε = {total_epsilon(group, at):.4g} at δ = {at:g}"
        )
        if list_runs:
            lines += [
                f"  {run.name}  {run.status}, {run.steps:,} steps, ε = {total_epsilon([run], at):.4g}" for run in group
            ]
    lines.append(CHOICE)
    return "\n".join(lines)
