"""The page of keys, docs/keys.md, from the fields of `dpopt.config.Config` and the comments behind them.

python scripts/make_keys.py            # writes docs/keys.md
"""

import inspect
import re
from pathlib import Path

from dpopt.config.schema import Config
from dpopt.runs.identity import NOT_IDENTITY

ROOT = Path(__file__).resolve().parents[1]
INTRODUCTION = """\
# Keys

Set keys on the command line, `dpopt train batch_size=1024 optimizer.lr=1e-3`, or in a preset of conf/experiment/.
Defaults are those of the code; conf/config.yaml, presets and groups change some of them, and `dpopt train … --cfg job`
prints the configuration of a command. Keys marked ○ do not identify a run: you can resume it with a different value.
`python scripts/make_keys.py` writes this page.
"""


def page() -> str:
    """Write the whole page."""
    parts = [INTRODUCTION]
    for line in inspect.getsource(Config).splitlines():
        if line.strip() == "def __post_init__(self) -> None:":
            break
        if heading := re.fullmatch(r"    # ([\w ]+)\. (.*)", line):
            parts.append(f"\n## {heading[1]}\n\n{heading[2]}\n\n| key | default | |\n|---|---|---|")
        elif field := re.fullmatch(r"    (\w+): .*? = (.*?)  # (?:noqa: UP045 \()?(.*?)\)?", line):
            name, default, meaning = field.groups()
            shown = "a group" if "default_factory" in default else f"`{default}`".replace("None", "null")
            mark = " ○" if name in NOT_IDENTITY else ""
            closing = ")" if meaning.count("(") > meaning.count(")") else ""
            parts.append(f"| `{name}`{mark} | {shown} | {meaning}{closing} |")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "keys.md").write_text(page())
