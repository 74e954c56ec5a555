"""Write one HTML page of finished runs: groups over seeds, curves, privacy cards and configurations.

dpopt report 'runs/*'
dpopt report 'runs/*adam*' 'runs/*sgd*' -o adam.html

The page loads nothing: send it, or open it anywhere. Runs that differ only in their seed make a group, and groups are
compared with the first one, as by dpopt runs compare. The configurations name folders of this machine.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from dpopt.cli import verb_parser


def report(words: Sequence[str]) -> int:
    """Write the page; return the exit code."""
    parser = verb_parser("report", __doc__)
    parser.add_argument("globs", nargs="+", metavar="GLOB", help="run directories, or folders of them")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"))
    parser.add_argument("--measure", default="test_accuracy", help="a key of result.json (default: test_accuracy)")
    arguments = parser.parse_args(words)
    from dpopt import files
    from dpopt.runs.comparison import find_runs
    from dpopt.runs.report import report as written

    found, others = find_runs(arguments.globs)
    files.write_atomic(arguments.output, written(found, arguments.measure))
    print(f"wrote {arguments.output}: {len(found)} runs")
    if others:
        print(f"left out, because they are not finished: {', '.join(path.name for path in others)}", file=sys.stderr)
    return 0
