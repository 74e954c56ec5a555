"""TAB completion of `dpopt`: verbs, then Hydra's overrides.

The shell calls `dpopt -sc query=bash` with the line typed so far in COMP_LINE.
"""

import os
from collections.abc import Collection, Sequence

from dpopt.cli.train import train

_HYDRA = ("train", "estimate")  # verbs whose words are Hydra's


def complete(words: Sequence[str], verbs: Collection[str]) -> int:
    """Print completions of COMP_LINE, or for `-sc install=bash` the shell's script."""
    typed = os.environ.get("COMP_LINE", "").split(" ")
    if not any(word.startswith("query=") for word in words):
        return train(words)
    if len(typed) <= 2:  # dpopt VER
        print(" ".join(verb for verb in verbs if verb.startswith("".join(typed[1:]))))
    elif typed[1] in _HYDRA:
        os.environ["COMP_LINE"] = " ".join([typed[0], *typed[2:]])
        return train(words)
    return 0
