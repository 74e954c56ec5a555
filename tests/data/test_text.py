"""Datasets of text: what becomes a token, what becomes a target, and what is refused in a sentence."""

import json

import pytest
import torch
from text_models import WORDS, make_tokenizer

from dpopt import data
from dpopt.data.holdout import check_holdout
from dpopt.data.pretraining import check_pretraining
from dpopt.data.records import read_columns, sentences_of
from dpopt.data.sources import TensorSource
from dpopt.data.tokens import IGNORED, PAD
from dpopt.rng import RandomKey

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return str(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def write(folder, name, content):
    (folder / name).write_text(content)
    return name


def classes_of(folder, named, rows="a film,good\n", suffix="csv", **options):
    name = write(folder, f"train.{suffix}", "text,label\n" + rows if suffix == "csv" else rows)
    options = {"train_size": 1, "classes": ("bad", "good"), "max_length": 6, "tokenizer": named} | options
    return data.text_file((name, name), **options).load(folder, CPU, 0)


def test_a_classifier_reads_ids_padded_by_minus_one(tmp_path, tokenizer):
    train, _ = classes_of(tmp_path, tokenizer, 'a film,good\n"the film, is very very very bad",bad\n', train_size=2)
    assert train.inputs.tolist() == [[2, 4, 5, 3, PAD, PAD], [2, 10, 5, 1, 11, 12]]  # the second is cut
    assert train.targets.tolist() == [1, 0]


def test_every_kind_of_file_reads_alike(tmp_path, tokenizer):
    lines = [("text", "label"), ("a film", "good"), ('the "bad" film', "bad")]
    csv = classes_of(tmp_path, tokenizer, 'a film,good\n"the ""bad"" film",bad\n')[0]
    tsv = classes_of(tmp_path, tokenizer, "".join("\t".join(line) + "\n" for line in lines), "tsv")[0]
    rows = "".join(json.dumps(dict(zip(lines[0], line, strict=True))) + "\n" for line in lines[1:])
    jsonl = classes_of(tmp_path, tokenizer, rows, "jsonl")[0]
    for other in (tsv, jsonl):
        assert torch.equal(csv.inputs, other.inputs) and torch.equal(csv.targets, other.targets)


def test_a_language_model_writes_completions_only(tmp_path, tmp_path_factory):
    plain = str(make_tokenizer(tmp_path_factory.mktemp("plain"), cls=False))
    name = write(tmp_path, "pairs.jsonl", json.dumps({"prompt": "name film", "ref": "a good film"}) + "\n")
    spec = data.text_file((name, name), 1, ("prompt", "ref"), max_length=8, tokenizer=plain)
    train, _ = spec.load(tmp_path, CPU, 0)
    assert train.inputs.tolist() == [[13, 5, 4, 6, 5, 3, PAD, PAD]]
    assert train.targets.tolist() == [[IGNORED, 4, 6, 5, 3, IGNORED, IGNORED, IGNORED]]
    assert spec.task == "language_modeling" and spec.classes == 0


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ("a film,good\n  ,bad\n", {}, r"record 2 of .*train.csv has an empty text: remove it, or fill it in"),
        ("a film,great\n", {}, r"record 1 of .* has the label 'great', which is none of the classes \(bad, good\)"),
        (
            "a film,good\n",
            {"columns": ("review", "label")},
            r"has no column 'review' but text, label: set dataset.columns",
        ),
        ("a film,good\n", {"tokenizer": None}, r"text needs a tokenizer .*model=minilm.* or set dataset.tokenizer"),
        (
            "a film,good\n",
            {"tokenizer": "no/such"},
            r"dataset.tokenizer=no/such can neither be read here nor downloaded",
        ),
        ("a film,good\n", {"train_size": 0}, r"needs two files and the number of training records: set dataset.files="),
        ("", {}, r"train.csv holds no records: give it at least one"),
    ],
    ids=["empty", "label", "column", "no tokenizer", "tokenizer", "no size", "no records"],
)
def test_refusals(tmp_path, tokenizer, monkeypatch, rows, options, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the environment is read at import
    with pytest.raises((ValueError, OSError), match=message):
        classes_of(tmp_path, tokenizer, rows, **options)


def test_other_files_are_refused(tmp_path, tokenizer):
    for name, content, message in (
        ("train.txt", "a", r"neither .csv, .tsv nor .jsonl"),
        ("train.jsonl", "a\n", r"line 1 of .* is no JSON"),
    ):
        write(tmp_path, name, content)
        spec = data.text_file((name, name), 1, classes=("bad", "good"), tokenizer=tokenizer)
        with pytest.raises(ValueError, match=message):
            spec.load(tmp_path, CPU, 0)
    spec = data.text_file(("none.csv", "none.csv"), 1, classes=("bad", "good"), tokenizer=tokenizer)
    with pytest.raises(FileNotFoundError, match=r"none.csv is missing: put the file there, or set data_dir"):
        spec.load(tmp_path, CPU, 0)


def sst2_files(folder):
    (folder / "SST-2").mkdir()
    train = ["sentence\tlabel", "the film is good\t1", "is good\t1", "a dull film\t0", "dull\t0", "very fine\t1"]
    (folder / "SST-2/train.tsv").write_text("\n".join(train) + "\n")
    (folder / "SST-2/dev.tsv").write_text("sentence\tlabel\na fine film\t1\n")


def test_sst2_groups_phrases_by_sentence(tmp_path, tokenizer):
    sst2_files(tmp_path)
    spec = data.sst2(16, tokenizer=tokenizer)
    train, test = spec.load(tmp_path, CPU, 0)
    assert train.groups == [*["the film is good"] * 2, *["a dull film"] * 2, "very fine"] and len(test) == 1
    assert train.contents()[0] == train.contents()[1] != train.contents()[2]
    assert "phrase" in spec.unit


def test_a_part_is_the_same_for_everybody(tmp_path, tokenizer):
    lines = [f"DESC:x the film {WORDS[4 + i % 11]} {WORDS[4 + i // 11 % 11]}" for i in range(5_452)]
    (tmp_path / "trec").mkdir()
    for name in ("train_5500.label", "TREC_10.label"):
        (tmp_path / "trec" / name).write_text("\n".join(lines) + "\n", encoding="latin-1")
    whole, small, again = (
        data.trec(train_size=n, tokenizer=tokenizer).load(tmp_path, CPU, 0)[0] for n in (5_452, 100, 100)
    )
    assert len(whole) == 5_452 and len(small) == 100
    assert torch.equal(small.inputs, again.inputs) and not torch.equal(small.inputs, whole.inputs[:100])


def test_sentences_of_phrases():
    texts = ["a b c d", "b c", "c b", "d", "x y", "y", "a b c d "]
    assert [text.split() for text in sentences_of(texts)] == [
        list(t) for t in ("abcd", "abcd", "cb", "abcd", "xy", "xy", "abcd")
    ]


def padded(lengths, width=64):
    rows = torch.full((len(lengths), width), PAD)
    for row, length in zip(rows, lengths, strict=True):
        row[:length] = torch.arange(length) + 1
    return rows


def test_micro_batches_are_as_long_as_their_longest_text():
    lengths = [40, 3, 17, 64, 9, 16, 1, 33]
    targets = torch.arange(8)[:, None].expand(8, 64)
    source = TensorSource(padded(lengths), targets, trimmed=True)
    key = RandomKey.from_seed(0)
    pieces = list(source.views([(0, torch.arange(8)), (1, torch.arange(0))], key, 1, 4))
    assert [x.shape for x, _ in pieces] == [(4, 1, 16), (4, 1, 64), (0, 1, 16)]
    assert [tuple(y.shape) for _, y in pieces] == [(4, 16), (4, 64), (0, 16)]
    found = {int(y[0]): int((x >= 0).sum()) for piece in pieces for x, y in zip(*piece, strict=True)}
    assert found == dict(enumerate(lengths))  # nothing is cut, and each text keeps its targets
    assert [x.shape[1] for x, _ in source.plain(4)] == [64, 64]


@pytest.mark.parametrize(
    ("tokens", "targets", "message"),
    [
        (torch.tensor([[PAD, 1, 2]]), torch.tensor([0]), "pad them on the right"),
        (torch.tensor([[1, 2, PAD]]), torch.zeros(1, 7), "give one target per token"),
    ],
    ids=["left", "targets"],
)
def test_what_trimming_would_change_is_refused(tokens, targets, message):
    with pytest.raises(ValueError, match=message):
        TensorSource(tokens, targets, trimmed=True)


def test_prompts_are_cut_before_completions(tmp_path, tokenizer):
    name = write(tmp_path, "long.jsonl", json.dumps({"prompt": "very " * 20, "ref": "a good film"}) + "\n")
    spec = data.text_file((name, name), 1, ("prompt", "ref"), max_length=6, tokenizer=tokenizer)
    train, _ = spec.load(tmp_path, CPU, 0)
    assert train.inputs[0, -4:].tolist() == [4, 6, 5, 3] and train.targets[0].tolist()[1:5] == [4, 6, 5, 3]


def test_labels_of_the_hub_are_names_first(tmp_path, tokenizer, monkeypatch):
    """Numbers that name classes are not places in their list."""
    import datasets

    def load(path, *subset, split):
        return datasets.Dataset.from_dict({"text": ["a film", "good", "bad"], "label": path_to_labels[path]})

    def targets(path, classes):
        spec = data.hub_text(path, 3, classes=classes, max_length=6, tokenizer=tokenizer)
        return spec.load(tmp_path, CPU, 0)[0].targets.tolist()

    path_to_labels = {"owner/named": [1, 2, 1], "owner/placed": [0, 1, 0], "owner/neither": [1, 2, 3]}
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert targets("owner/named", ("1", "2")) == targets("owner/placed", ("bad", "good")) == [0, 1, 0]
    with pytest.raises(ValueError, match=r"record 3 of .* has the label '3'"):
        targets("owner/neither", ("1", "2"))


@pytest.mark.parametrize("origin", ["SST-2", "web, glue", "sst"])
@pytest.mark.parametrize("spec", [data.sst2(), data.hub_text("nyu-mll/glue/sst2", 1, classes=("0", "1"))])
def test_other_spellings_of_a_collection_are_known(origin, spec):
    if origin == "sst" and spec.name == "sst2" and "mll" in spec.collection:
        return
    node = {"pretrained": True, "path": "x", "pretrained_on": origin}
    with pytest.raises(ValueError, match="so ε would not cover"):
        check_pretraining(spec, node)


def test_a_private_holdout_by_what_others_hold_is_refused():
    with pytest.raises(ValueError, match=r"sst2 are grouped by what others hold.*holdout_by=position"):
        check_holdout(data.sst2(), "content")
    check_holdout(data.sst2(), "position")
    check_holdout(data.trec(), "content")


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0c", "\x1c"])
def test_a_text_may_hold_what_python_takes_for_a_line_end(tmp_path, tokenizer, mark):
    text = f"the film{mark}is good"
    for suffix, content in (
        ("csv", f'text,label\n"{text}",good\na film,bad\n'),
        ("tsv", f"text\tlabel\n{text}\tgood\na film\tbad\n"),
        (
            "jsonl",
            json.dumps({"text": text, "label": "good"}, ensure_ascii=False) + '\n{"text": "a film", "label": "bad"}\n',
        ),
    ):
        (tmp_path / f"marks.{suffix}").write_text(content, encoding="utf-8")
        read = read_columns(tmp_path / f"marks.{suffix}", "text", "label")
        assert read.texts == [text, "a film"] and read.targets == ["good", "bad"], suffix
