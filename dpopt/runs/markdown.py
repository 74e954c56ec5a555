"""The Markdown of privacy cards: names escaped for it, and its HTML.

HTML is written of headings, paragraphs, lists, tables, blocks of code, bold and code; all else is text.
"""

import re
from collections.abc import Iterator
from html import escape
from itertools import groupby

_SPECIAL = re.compile(r"[\\`*|<>\[\]#~]|(?<!\w)_|_(?!\w)")  # an underscore within a word is plain
_FENCE = re.compile(r"^```.*\n?", re.MULTILINE)
_KINDS = (("heading", re.compile(r"#{1,4} ")), ("row", re.compile(r"\|.*\|$")), ("item", re.compile(r"(- |  \S)")))


def plain(text: str) -> str:
    """Escape text, so that Markdown shows it as it is, on one line."""
    return _SPECIAL.sub(lambda found: f"\\{found[0]}", " ".join(text.split()))


def code(text: str) -> str:
    """Mark a name as code, or escape it where code cannot hold it."""
    return f"`{text}`" if text and not re.search(r"[`|\s]", text) else plain(text)


def to_html(text: str, level: int = 3) -> str:
    """Write Markdown as HTML that is well-formed whatever the text; `# ` becomes a heading of the level."""
    found: list[str] = []
    for number, part in enumerate(_FENCE.split(text)):
        found += [f"<pre>{escape(part.rstrip())}</pre>"] if number % 2 else _blocks(part.splitlines(), level)
    return "\n".join(found)


def _blocks(lines: list[str], level: int) -> Iterator[str]:
    for kind, group in groupby(lines, _kind):
        members = list(group)
        if kind == "heading":
            for line in members:
                marks, _, title = line.partition(" ")
                depth = min(level + len(marks) - 1, 6)
                yield f"<h{depth}>{_inline(title)}</h{depth}>"
        elif kind == "row":
            yield _table(members)
        elif kind == "item":
            yield _list(members)
        elif kind == "text":
            yield f"<p>{_inline(' '.join(members))}</p>"


def _kind(line: str) -> str:
    if not line.strip():
        return "blank"
    return next((kind for kind, pattern in _KINDS if pattern.match(line)), "text")


def _table(lines: list[str]) -> str:
    """Write rows; their first cells are heads, and rows without words are left out."""
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line[1:-1])] for line in lines]
    told = [row for row in rows if any(cell.strip("-: ") for cell in row)]
    body = "\n".join(
        f'<tr><th scope="row">{_inline(first)}</th>{"".join(f"<td>{_inline(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in told
    )
    return f'<table class="card"><tbody>\n{body}\n</tbody></table>'


def _list(lines: list[str]) -> str:
    items: list[str] = []
    for line in lines:
        if line.startswith("- ") or not items:
            items.append(line.removeprefix("- ").strip())
        else:
            items[-1] += f" {line.strip()}"
    return "<ul>\n" + "\n".join(f"<li>{_inline(item)}</li>" for item in items) + "\n</ul>"


def _inline(text: str) -> str:
    """Escape text, and mark `code` and **bold**."""
    parts, bold = [], False
    for token in re.split(r"(\\[!-/:-@\[-`{-~]|`[^`]+`|\*\*)", text):
        if token == "**":
            parts.append("</strong>" if bold else "<strong>")
            bold = not bold
        elif len(token) > 2 and token[0] == token[-1] == "`":
            parts.append(f"<code>{escape(token[1:-1])}</code>")
        else:
            parts.append(escape(token[1:] if len(token) == 2 and token[0] == "\\" else token))
    return "".join(parts) + ("</strong>" if bold else "")
