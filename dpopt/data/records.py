"""Records of text, and the files that they are read from."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpopt.rng import RandomKey


@dataclass
class Records:
    """Texts and what is to be told or written of them.

    Attributes:
        texts: of the records; prompts for a language model.
        targets: names of classes, or completions.
        origin: where they are from, for errors.
        groups: a name per record, by which hold-outs are split; empty for none.
    """

    texts: list[str]
    targets: list[str]
    origin: str
    groups: list[Any] = field(default_factory=list)

    def part_of(self, whole: int, size: int) -> "Records":
        """Choose `size` of `whole` records at random, the same ones for everybody; all, if there are not as many."""
        if len(self.texts) != whole or size >= whole:
            return self
        at = sorted(RandomKey.from_seed(0, "part").uniform(len(self.texts), "records").argsort()[:size].tolist())
        groups = [self.groups[i] for i in at] if self.groups else []
        return Records([self.texts[i] for i in at], [self.targets[i] for i in at], self.origin, groups)


def read_columns(path: Path, text: str | None, target: str) -> Records:
    """Read two columns of a file.

    Raises:
        ValueError: for a missing column or a file of another kind; FileNotFoundError for a missing file.
    """
    rows = list(read_rows(path))
    if not rows:
        raise ValueError(f"{path} holds no records: give it at least one")
    for column in filter(None, (text, target)):
        check_column(column, list(rows[0]), str(path))
    texts = [str(row.get(text) or "") if text else "" for row in rows]
    return Records(texts, [str("" if row.get(target) is None else row[target]) for row in rows], str(path))


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a .csv or .tsv with a header, or of a .jsonl.

    Raises:
        ValueError: for a file of another kind; FileNotFoundError for a missing file.
    """
    content = read_text(path)
    if path.suffix == ".jsonl":
        for i, line in enumerate(lines_of(content)):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {i + 1} of {path} is no JSON: give one object per line") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {i + 1} of {path} is no JSON object: give one object per line")
            yield row
    elif path.suffix == ".csv":
        yield from csv.DictReader(lines_of(content))
    elif path.suffix == ".tsv":  # as GLUE writes it: quotes are text
        yield from csv.DictReader(lines_of(content), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        raise ValueError(f"{path} is neither .csv, .tsv nor .jsonl: convert it to one of them")


def lines_of(content: str) -> io.StringIO:
    """Split a text at line ends only; `str.splitlines` splits at characters that texts hold, too (U+2028, U+0085)."""
    return io.StringIO(content, newline="")


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Read a file.

    Raises:
        ValueError: for another encoding; FileNotFoundError for a missing file.
    """
    try:
        with path.open(encoding=encoding, newline="") as file:  # line ends within quotes stay
            return file.read()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is missing: put the file there, or set data_dir (or DPOPT_DATA_DIR) to the folder that holds it"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason}): convert it") from error


def check_column(column: str, found: Sequence[str], where: str) -> None:
    """Check that there is a column.

    Raises:
        ValueError: naming those that there are.
    """
    if column not in found:
        names = ", ".join(map(str, found[:8]))
        raise ValueError(f"{where} has no column {column!r} but {names}: set dataset.columns")


def sentences_of(texts: Sequence[str]) -> list[str]:
    """Name, for each text, the longest text that it is part of, word by word; equal texts agree."""
    order = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), texts[i]))
    owner: dict[str, int] = {}
    for i in order:
        words = texts[i].split()
        if " ".join(words) in owner:
            continue
        for start in range(len(words)):
            for end in range(start + 1, len(words) + 1):
                owner.setdefault(" ".join(words[start:end]), i)
    return [texts[owner[" ".join(text.split())]] if text.split() else text for text in texts]
