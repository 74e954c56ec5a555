"""`dpopt table`: write the tables of experiments/, or print what their missing runs are or would cost.

dpopt table cifar10                     # → experiments/results/cifar10/cpu/table.md, .csv, .tex, *.png
dpopt table cifar10 --run --jobs 2      # its missing runs first, in two processes
dpopt table cifar10 --run --add         # what the page lacks: its own runs count, wherever they were made
dpopt table cifar10 --commands          # the commands of its missing runs
dpopt table cifar10 --size full --plan  # what its runs would cost on this machine
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpopt.cli import verb_parser
from dpopt.tables import spec
from dpopt.tables.launch import launch


def table(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code."""
    parser = verb_parser("table", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a file of experiments/; by default all of the size")
    parser.add_argument("--size", choices=spec.SIZES, default="cpu")
    parser.add_argument("--output", type=Path, help="experiments/results, or runs/tables for size smoke")
    parser.add_argument("--run", action="store_true", help="run what is missing first; its output goes to runs/.log")
    parser.add_argument("--jobs", type=int, default=1, help="processes of --run (default: 1)")
    parser.add_argument("--commands", action="store_true", help="print the commands of missing runs, and stop")
    parser.add_argument("--plan", action="store_true", help="print what the runs would cost here, and stop")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument(
        "--add", action="store_true", help="count the runs of one table's page that are not here, and add to them"
    )
    kept.add_argument("--force", action="store_true", help="overwrite tables that hold more runs than are here")
    options = parser.parse_args(arguments)
    names = options.names or spec.names_at(options.size)
    for name in names:
        spec.check_size(spec.read(name), options.size)
    output = options.output or (spec.ROOT / "runs/tables" if options.size == "smoke" else spec.RESULTS)
    if options.add:
        if len(names) != 1:
            raise ValueError("--add goes on with the page of one table: name it")
        spec.count_page(names[0], options.size, output)
    if options.commands:
        lines = [line for name in names for line in spec.commands(name, options.size)]
        print("\n".join(dict.fromkeys(lines)))
    elif options.plan:
        for name in names:
            print(plan(name, options.size))
    else:
        if options.run:
            launch(names, options.size, max(1, options.jobs))
        for name in names:
            write(name, options.size, output, options.force)
    return 0


def write(name: str, size: str, output: Path, force: bool = False) -> None:
    """Draw a table's figures and write its page, unless a fuller one is there."""
    from dpopt.tables import figures, render

    if not force and (why := spec.why_kept(name, size, output)):
        print(f"{why}, and so are its figures (--force overwrites; --output names another folder)")
        return
    done, wanted = spec.finished(spec.read(name), size)
    print(f"{name}, size {size}: {done} of {wanted} runs are finished", file=sys.stderr, flush=True)
    for path in figures.draw(name, size, output):
        print(path)
    if spec.read(name)["tables"]:
        print(render.write(name, size, output))


def plan(name: str, size: str) -> str:
    """Estimate the runs of a table here: every row once, without data."""
    from dpopt.runs.identity import content_key
    from dpopt.runs.sweep import cost
    from dpopt.training.run import run

    about = spec.read(name)
    found: dict[str, dict[str, Any]] = {}
    plans: dict[str, dict[str, Any]] = {}  # what differs by seed and ε alone takes the same time
    for entry in about["tables"]:
        for job in spec.jobs(about, entry, size):
            config = replace(job.config, seed=0, dry_run=True)
            if config.epsilon and math.isfinite(config.epsilon):
                config = replace(config, epsilon=8.0)
            key = content_key(config)
            if key not in plans:
                plans[key] = run(config)
            found[str(job.directory())] = plans[key] | {"status": job.result()["status"]}
    expected = about.get("hours", {}).get(size, {})
    hours = [f"expected hours on {hardware}: {hours}" for hardware, hours in expected.items()]
    return " · ".join([f"{name}, size {size}: {cost(list(found.values()))}", *hours])
