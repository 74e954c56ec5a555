"""Datasets of text: records are read from files, tokenized once per run, and padded by -1 to one public length.

A classifier reads a text and its class. A language model reads a prompt and writes a completion: a record's targets are
the tokens of the completion and the end of text, each at the position before it; all others are -100.
"""

import csv
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dpopt.data.datasets import DataSpec
from dpopt.data.records import Records, check_column, lines_of, read_columns, read_text, sentences_of
from dpopt.data.sources import TensorSource
from dpopt.data.tokens import TextRows, Tokens
from dpopt.models.transformer import unavailable

_PHRASE = "one phrase with its label; SST-2's phrases are parts of about 6,900 sentences, which are protected less"
_REFERENCE = (
    "one reference text with its meaning representation; E2E has about nine references of each meaning representation, "
    "which is protected less"
)


def text_file(
    files: Sequence[str],
    train_size: int,
    columns: Sequence[str | None] = ("text", "label"),
    classes: Sequence[str] | None = None,
    max_length: int = 128,
    tokenizer: str | None = None,
    unit: str = "one record",
    collection: str = "",
) -> DataSpec:
    """Local files of records: .csv or .tsv with a header, or .jsonl.

    Args:
        files: of training and of test records, in the data folder, or their paths.
        train_size: number of training records, checked against the file.
        columns: of the text (or of the prompt; null for none), and of the class (or of the completion).
        classes: names of the classes in their order; None to write the second column instead.
        max_length: tokens of a record; what is longer is cut.
        tokenizer: name on the Hugging Face hub, a folder, a .gguf file or `bytes`; the model's by default.
        unit: what a record is, for the privacy card.
        collection: public collection of the texts, on which initial weights must not have been trained.
    """
    if len(files) != 2 or not train_size:
        raise ValueError(
            "dataset=text_file needs two files and the number of training records: set "
            "dataset.files=[train.csv,test.csv] dataset.train_size=N"
        )
    text, target = columns

    def read(data_dir: Path) -> tuple[Records, Records]:
        train, test = (read_columns(data_dir / name, text, str(target)) for name in files)
        return train, test

    tokens = Tokens(tokenizer, max_length)
    return _spec(Path(files[0]).stem, train_size, classes, tokens, read, unit, collection, str(text))


def hub_text(
    path: str,
    train_size: int,
    columns: Sequence[str | None] = ("text", "label"),
    classes: Sequence[str] | None = None,
    splits: Sequence[str] = ("train", "test"),
    max_length: int = 128,
    tokenizer: str | None = None,
    collection: str | None = None,
) -> DataSpec:
    """Describe a text dataset of the Hugging Face hub.

    It is downloaded where the network allows it, or comes from the cache of `datasets`.

    Args:
        path: OWNER/NAME, or OWNER/NAME/SUBSET.
        train_size: number of training records, checked.
        columns: of the text (or of the prompt; null for none), and of the class, a number or a name (or of the
            completion).
        classes: names of the classes in their order; None to write the second column instead.
        splits: of training and of test records.
        max_length: tokens of a record; what is longer is cut.
        tokenizer: name on the Hugging Face hub, a folder, a .gguf file or `bytes`; the model's by default.
        collection: names of the public collection of the texts, separated by commas, on which initial weights must not
            have been trained; None for the parts of `path`.
    """
    if path.count("/") not in (1, 2) or not train_size:
        raise ValueError(
            "dataset=hub_text needs a name and the number of training records: set dataset.path=OWNER/NAME "
            "dataset.train_size=N"
        )

    def read(_: Path) -> tuple[Records, Records]:
        train, test = (_from_hub(path, split, columns, classes) for split in splits)
        return train, test

    name = path.rpartition("/")[2]
    return _spec(
        name,
        train_size,
        classes,
        Tokens(tokenizer, max_length),
        read,
        "one record",
        path.replace("/", ",") if collection is None else collection,
        str(columns[0]),
    )


def _from_hub(path: str, split: str, columns: Sequence[str | None], classes: Sequence[str] | None) -> Records:
    """Read a split; numbers of classes become their names."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError("dataset=hub_text needs datasets, which is not installed: pip install datasets") from error
    owner, name, *subset = path.split("/")
    with unavailable(f"dataset.path={path}"):
        rows = load_dataset(f"{owner}/{name}", *subset, split=split)
    for column in filter(None, columns):
        check_column(column, rows.column_names, f"{path}, {split}")
    text, target = columns
    names = list(map(str, classes or ()))
    numbers = dict(enumerate(names)) if not {str(t) for t in rows[target]} <= set(names) else {}
    named = [str(numbers.get(t, t)) if isinstance(t, int) else str(t) for t in rows[target]]
    return Records([""] * len(named) if text is None else list(rows[text]), named, f"{path}, {split}")


def sst2(max_length: int = 64, train_size: int = 67_349, tokenizer: str | None = None) -> DataSpec:
    """SST-2 (Socher et al., 2013) as in GLUE: 67,349 phrases and 872 sentences, negative or positive.

    DATA_DIR/SST-2 holds train.tsv and dev.tsv, which has the labels of the test. Hold-outs are split by sentence, since
    phrases are parts of each other.

    Args:
        max_length: tokens of a record.
        train_size: number of training records; fewer than all are a random part, the same for everybody.
        tokenizer: name on the Hugging Face hub, a folder, a .gguf file or `bytes`; the model's by default.
    """

    def read(data_dir: Path) -> tuple[Records, Records]:
        train, test = (
            read_columns(data_dir / "SST-2" / f"{part}.tsv", "sentence", "label") for part in ("train", "dev")
        )
        train.groups = sentences_of(train.texts)
        return train.part_of(67_349, train_size), test

    return _spec(
        "sst2", train_size, ("0", "1"), Tokens(tokenizer, max_length), read, _PHRASE, "sst2, sst, glue", "sentence"
    )


def trec(max_length: int = 32, train_size: int = 5_452, tokenizer: str | None = None) -> DataSpec:
    """TREC (Li & Roth, 2002): 5,452 and 500 questions of six coarse classes.

    DATA_DIR/trec holds train_5500.label and TREC_10.label.

    Args:
        max_length: tokens of a record.
        train_size: number of training records; fewer than all are a random part, the same for everybody.
        tokenizer: name on the Hugging Face hub, a folder, a .gguf file or `bytes`; the model's by default.
    """

    def part(path: Path) -> Records:
        lines = [line.split(" ", 1) for line in lines_of(read_text(path, "latin-1"))]
        return Records([line[1].strip() for line in lines], [line[0].split(":")[0] for line in lines], str(path))

    def read(data_dir: Path) -> tuple[Records, Records]:
        train = part(data_dir / "trec/train_5500.label")
        return train.part_of(5_452, train_size), part(data_dir / "trec/TREC_10.label")

    classes = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    return _spec("trec", train_size, classes, Tokens(tokenizer, max_length), read, "one question", "trec")


def agnews(max_length: int = 96, train_size: int = 120_000, tokenizer: str | None = None) -> DataSpec:
    """AG News (Zhang et al., 2015): 120,000 and 7,600 titles with descriptions, of four classes.

    DATA_DIR/ag_news holds train.csv and test.csv as published: class, title, description.

    Args:
        max_length: tokens of a record.
        train_size: number of training records; fewer than all are a random part, the same for everybody.
        tokenizer: name on the Hugging Face hub, a folder, a .gguf file or `bytes`; the model's by default.
    """

    def part(path: Path) -> Records:
        rows = list(csv.reader(lines_of(read_text(path))))
        return Records([f"{row[1]} {row[2]}" for row in rows], [row[0] for row in rows], str(path))

    def read(data_dir: Path) -> tuple[Records, Records]:
        train = part(data_dir / "ag_news/train.csv")
        return train.part_of(120_000, train_size), part(data_dir / "ag_news/test.csv")

    tokens = Tokens(tokenizer, max_length)
    return _spec("agnews", train_size, ("1", "2", "3", "4"), tokens, read, "one news item", "agnews")


def e2e(
    max_length: int = 100,
    train_size: int = 42_061,
    test_size: int | None = None,
    tokenizer: str | None = None,
) -> DataSpec:
    """E2E NLG (Novikova et al., 2017): 42,061 texts about restaurants, to be written from what they mean.

    DATA_DIR/e2e-dataset holds trainset.csv and testset_w_refs.csv, of which each meaning representation and each
    reference is a record.

    Args:
        max_length: tokens of a record; a prompt is cut at its start, so that the completion fits.
        train_size: number of training records; fewer than all are a random part, the same for everybody.
        test_size: number of test records, chosen likewise; None for all.
        tokenizer: name on the Hugging Face hub, a folder, a .gguf file or `bytes`; the model's by default.
    """

    def read(data_dir: Path) -> tuple[Records, Records]:
        names = ("trainset.csv", "testset_w_refs.csv")
        train, test = (read_columns(data_dir / "e2e-dataset" / name, "mr", "ref") for name in names)
        train.groups = train.texts
        size = len(test.texts)
        return train.part_of(42_061, train_size), test.part_of(size, size if test_size is None else test_size)

    return _spec("e2e", train_size, None, Tokens(tokenizer, max_length), read, _REFERENCE, "e2e, e2e_nlg")


def _spec(
    name: str,
    train_size: int,
    classes: Sequence[str] | None,
    tokens: Tokens,
    read: Callable[[Path], tuple[Records, Records]],
    unit: str,
    collection: str,
    column: str = "text",
) -> DataSpec:
    def load(data_dir: Path, device: torch.device, workers: int) -> tuple[TensorSource, TensorSource]:
        parts = []
        for records in read(data_dir):
            inputs, targets = tokens.encode(records, classes)
            groups = records.groups or None
            parts.append(TensorSource(inputs.to(device), targets.to(device), groups=groups, trimmed=True))
        return parts[0], parts[1]

    constants = f"tokens of {tokens.tokenizer}, the first {tokens.max_length} of a record"
    task = "language_modeling" if classes is None else "sequence_classification"
    count = 0 if classes is None else len(classes)
    spec = DataSpec(
        name, train_size, count, (tokens.max_length,), load, constants, collection, task, unit, unit == _PHRASE
    )
    return spec if classes is None else replace(spec, inputs=TextRows(tokens, column), class_names=classes)
