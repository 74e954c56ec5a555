"""Hydra's command line: flags, overrides, and the folders of one's own configuration."""

import contextlib
import io
import os
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from hydra._internal.utils import get_args_parser


def parse(words: Sequence[str]) -> Namespace:
    """Parse Hydra's flags and overrides, in any order."""
    return get_args_parser().parse_intermixed_args(list(words))


def flags_first(words: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Move the flags before the overrides; Hydra accepts no flag between two of them."""
    rest = list(overrides)
    flags = [word for word in words if not (rest and word == rest[0] and rest.pop(0))]
    return [*flags, *overrides]


def own_folders(arguments: Namespace) -> list[Path]:
    """List the configuration folders that the command line adds to the built-in one."""
    found = [Path(folder) for folder in (arguments.config_dir,) if folder]
    if arguments.config_path:  # Hydra reads it relative to the file of the job
        found.append(Path(__file__).parent / arguments.config_path)
    for word in arguments.overrides:
        if word.lstrip("+").startswith("hydra.searchpath="):
            found += map(Path, re.findall(r"file://([^,\]'\"]+)", word))
    return [folder for folder in found if folder.is_dir()]


def complete_typed_line(words: Sequence[str]) -> list[str]:
    """Prepare COMP_LINE for Hydra's completion; return its words.

    Hydra expects flags before overrides, and completes from a --config-dir among its own words alone.
    """
    words, line = list(words), os.environ.get("COMP_LINE", "").split(" ")
    script = len(line) > 1 and line[1].endswith(".py")  # python run.py
    *typed, last = line[2 if script else 1 :] or [""]
    typed = [word for word in typed if word]
    if last.startswith("-") or (typed and typed[-1] in ("-cd", "--config-dir")):
        sys.exit(0)  # a flag, or a folder, which the shell completes
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            arguments = parse(typed)
    except SystemExit:  # no valid command line: nothing to complete
        sys.exit(0)
    os.environ["COMP_LINE"] = " ".join(["dpopt", *flags_first(typed, arguments.overrides), last])
    folder = [arguments.config_dir] if arguments.config_dir and os.path.isdir(arguments.config_dir) else []
    return [*words, *(f"--config-dir={path}" for path in folder)]
