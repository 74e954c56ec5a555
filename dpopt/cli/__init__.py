"""The `dpopt` command: a verb per file.

dpopt train experiment=quickstart
dpopt --help
"""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

VERBS = {
    "train": ("dpopt.cli.train:train", "train a run or a sweep: dpopt train experiment=quickstart"),
    "estimate": ("dpopt.cli.train:estimate", "print the plan, memory and time of a run or a sweep; train nothing"),
    "evaluate": ("dpopt.cli.evaluate:evaluate", "evaluate a finished run on its test set: dpopt evaluate runs/NAME"),
    "predict": ("dpopt.cli.predict:predict", "predict the class of new images or rows: dpopt predict RUN FOLDER"),
    "export": ("dpopt.cli.export:export", "write a run's model, with its card, to hand on: dpopt export RUN FOLDER"),
    "rerun": ("dpopt.cli.rerun:rerun", "train a finished run again and compare the results: dpopt rerun runs/NAME"),
    "audit": ("dpopt.cli.audit:audit", "train with canaries and compare the claimed ε with what they show"),
    "ledger": ("dpopt.cli.ledger:ledger", "show what private runs have spent together on each dataset"),
    "budget": ("dpopt.cli.budget:budget", "tabulate σ for an ε, or ε for a σ, over batch sizes and epochs"),
    "runs": ("dpopt.cli.runs:runs", "list finished runs, compare them over seeds, draw their curves"),
    "report": ("dpopt.cli.report:report", "write one HTML page of finished runs: groups, curves, privacy cards"),
    "table": ("dpopt.cli.table:table", "run a table of experiments/ and write its page, CSV and figures"),
}


def main(words: Sequence[str] | None = None) -> int:
    """Run the verb that stands first; return the exit code.

    What is refused is printed in one sentence; HYDRA_FULL_ERROR=1 shows the stack.
    """
    words = sys.argv[1:] if words is None else words
    first, *rest = words or ["--help"]
    if first in ("-h", "--help", "help"):
        print(overview())
        return 0
    if first == "--version":
        print(f"dpopt {import_module('dpopt').__version__}")
        return 0
    if first in ("-sc", "--shell-completion"):
        from dpopt.cli.completion import complete

        return complete(words, VERBS)
    if first not in VERBS:
        print(_unknown(words), file=sys.stderr)
        return 2
    module, _, name = VERBS[first][0].partition(":")
    run: Callable[[Sequence[str]], int] = getattr(import_module(module), name)
    try:
        return run(rest)
    except (ValueError, OSError) as error:  # a refusal, in one sentence
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def verb_parser(verb: str, description: str | None) -> argparse.ArgumentParser:
    """Make the parser of a verb's arguments; its help shows the docstring as it is."""
    kind = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(f"dpopt {verb}", description=description, formatter_class=kind)


def overview() -> str:
    """List the verbs, a line each."""
    lines = [f"  {verb:9} {meaning}" for verb, (_, meaning) in VERBS.items()]
    return "\n".join(
        [
            "dpopt trains neural networks under differential privacy.",
            "",
            "usage: dpopt VERB ...    (dpopt VERB --help says more)",
            "",
            *lines,
            "",
            'TAB completion in bash: eval "$(dpopt -sc install=bash)"',
        ]
    )


def _unknown(words: Sequence[str]) -> str:
    """Name the verb that was meant."""
    if "=" in words[0] or words[0] in ("-m", "--multirun", "--cfg", "--config-dir", "-cd"):
        return f"{words[0]} is not a verb of dpopt: did you mean `dpopt train {' '.join(words)}`?"
    (nearest,) = difflib.get_close_matches(words[0], VERBS, 1, 0)
    return f"{words[0]} is not a verb of dpopt: did you mean {nearest}? (dpopt --help lists the verbs)"
