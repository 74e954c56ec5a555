"""What experiments/ defines: rows that run, sources of published numbers, tuned rates, the page of reproduction."""

import csv
from dataclasses import replace

import pytest
import yaml
from helpers import ROOT

from dpopt.tables import figures, render, reproduce_page, spec
from dpopt.training.run import run

pytestmark = pytest.mark.slow

NAMES = spec.names()
PROTOCOL = {"what", "value", "source", "protocol", "dataset", "model", "train_size", "epsilon", "delta"}
TUNED = {"digits_tuning": ("experiment=quickstart",), "cifar10_tuning": ("size=cpu",)}  # where the rates are used


@pytest.mark.parametrize("name", NAMES)
def test_every_table_is_complete_at_every_size(name):
    """Its keys are known; every published figure names its source and protocol and belongs to a cell."""
    about = spec.read(name)
    assert about["title"] and about["setting"] and set(about["sizes"]) <= set(spec.SIZES)
    assert "smoke" in about["sizes"] or name.endswith("_tuning")
    assert set(about["hours"]) == set(about["sizes"]) - {"smoke"}
    for entry in about["tables"]:
        assert entry["title"] and all(set(row) <= {"label", "runs", "at", "sizes"} for row in entry.get("rows", []))
        assert {size for part in (entry, *entry.get("rows", [])) for size in part.get("at", {})} <= set(about["sizes"])
        for published in entry.get("published", []):
            assert set(published) >= PROTOCOL and published["source"] and published["protocol"]
    titles = {entry["title"] for entry in about["tables"]}
    for figure in about.get("figures", []):
        assert figure["kind"] in figures.KINDS and figure.get("table", "") in titles | {""}
    size = next(iter(about["sizes"]))
    if about["tables"]:
        text, tex, runs = render.page(name, size)
        cells = {(run["table"], run["row"], run["column"], run["seed"]) for run in runs}
        assert len(cells) == len(runs) > 0 and (size != "smoke" or {run["seed"] for run in runs} == {0})
        assert "toprule" in tex and "Runs: `python run.py -m " in text


def test_published_figures_belong_to_rows():
    """At the size that they are published for, their cells exist, but for those of methods that have no row."""
    for name, size, missing in (("cifar10", "cpu", set()), ("augmult", "full", set()), ("imagenet", "full", {"eps8"})):
        about = spec.read(name)
        entry = about["tables"][0]
        cells = {(job.row, job.column) for job in spec.jobs(about, entry, size)}
        for published in entry["published"]:
            assert (published["row"], published["column"]) in cells or published["column"] in missing


@pytest.mark.parametrize("name", TUNED)
def test_tuned_learning_rates_are_the_best_of_their_table(name):
    with (spec.folder(name, "cpu") / "table.csv").open() as file:
        done = [line for line in csv.DictReader(file) if line["status"] == "finished"]
    scores: dict = {}
    for line in done:
        cell = line["table"], line["column"] if spec.read(name)["choose"] == "each" else "eps1"
        scores.setdefault(cell, {}).setdefault(float(line["row"]), []).append(float(line["private/holdout_accuracy"]))
    assert len(scores) >= 12
    cifar10 = spec.read("cifar10")
    (row,) = [row for row in cifar10["tables"][0]["rows"] if row.get("label") == "dp_sgd, large batch"]
    large = spec.words_of(cifar10, cifar10["tables"][0], row, "cpu")
    for (table, column), rates in scores.items():
        optimizer, _, variant = table.partition(", ")
        if variant and not variant.startswith("batch"):
            continue  # a row that names its rate
        words = large if variant else TUNED[name]
        words = spec.merge(*words, f"optimizer={optimizer}", f"privacy={column}", "seed=0")
        (job,) = spec.expand(words, label=table)
        means = {rate: sum(found) / len(found) for rate, found in rates.items()}
        assert means[float(job.config.optimizer["lr"])] > max(means.values()) - 1e-9, (table, column)


def test_rows_that_name_their_rate_name_the_best_on_the_hold_out():
    """Variants of DP-MicroAdam on CIFAR-10's features: the best of the tuning table of the same variant and budget."""

    def form(job):
        return {**job.config.optimizer, "lr": None}, job.column

    with (spec.folder("cifar10_tuning", "cpu") / "table.csv").open() as file:
        scores = {(line["table"], line["row"], line["column"]): line for line in csv.DictReader(file)}
    tuning = spec.read("cifar10_tuning")
    entries = [entry for entry in tuning["tables"] if entry["title"].startswith("dp_microadam, ")]
    tried = [(job, scores[e["title"], job.row, job.column]) for e in entries for job in spec.jobs(tuning, e, "cpu")]
    checked = 0
    for name in ("cifar10", "ablation"):
        about = spec.read(name)
        entry = about["tables"][0]
        rows = [row for row in entry["rows"] if "optimizer.lr=" in row.get("runs", "")]
        rows = [row for row in rows if "large batch" not in row["label"]]  # of DP-SGD, see the test above
        for job in spec.jobs(about, {**entry, "rows": rows}, "cpu"):
            same = [(float(line["private/holdout_accuracy"]), one) for one, line in tried if form(one) == form(job)]
            _, best = max(same, key=lambda pair: pair[0])
            assert len(same) >= 3 and best.config.optimizer["lr"] == job.config.optimizer["lr"], job.row
            checked += 1
    assert checked == 3 * 3 + 4 * 5


@pytest.mark.parametrize(
    "name, titles",
    [
        ("cnn5", {"Accuracy": "{}"}),
        (
            "squeezenet",
            {"The head": "head: {}", "The last two modules": "last two modules: {}", "Everything": "everything: {}"},
        ),
    ],
)
def test_rows_name_the_best_of_their_tuning_table(name, titles):
    """At each ε; where an ε was not searched, the best on average over those that were."""
    scores: dict[str, dict] = {}
    with (spec.folder(f"{name}_tuning", "cpu") / "table.csv").open() as file:
        for line in csv.DictReader(file):
            rates = scores.setdefault(line["table"], {}).setdefault(float(line["row"]), {})
            rates[line["column"]] = float(line["private/holdout_accuracy"])
    about, checked = spec.read(name), set()
    for entry in about["tables"]:
        for job in spec.jobs(about, entry, "cpu"):
            title = titles[entry["title"]].format(job.row)
            if title not in scores:
                continue  # with a published rate
            rates = {rate: found.get(job.column, sum(found.values())) for rate, found in scores[title].items()}
            given = job.config.estimator if job.row == "least squares" else job.config.optimizer
            assert rates[given.get("eigenvalue_floor", given.get("lr"))] == max(rates.values()), (title, job.column)
            checked.add(title)
    assert checked == set(scores)


def test_tuned_rates_are_found_by_data_set_and_model():
    files = sorted((ROOT / "conf/tuned").glob("*/*.yaml"))
    assert files
    for path in files:
        lines = path.read_text().splitlines()
        assert lines[0] == "# @package optimizer" and lines[1].startswith("# ")
        assert (ROOT / "conf/optimizer" / path.name).exists()
        assert any(
            path.parent.name == f"{d.stem}_{m.stem}"
            for d in (ROOT / "conf/dataset").glob("*.yaml")
            for m in (ROOT / "conf/model").glob("*.yaml")
        )
        assert set(yaml.safe_load(path.read_text())) <= {"lr", "momentum", "weight_decay"}


@pytest.fixture(scope="session")
def smoke_runs(tmp_path_factory):
    """Where rows of tables run: one that several tables share runs once."""
    return tmp_path_factory.mktemp("smoke")


@pytest.mark.parametrize("name", [name for name in NAMES if "smoke" in spec.read(name)["sizes"]])
def test_every_row_runs_at_the_smallest_size(name, smoke_runs, capsys):
    """Two steps of every distinct run; least squares has one."""
    about = spec.read(name)
    found = {job.name: job for entry in about["tables"] for job in spec.jobs(about, entry, "smoke")}
    for job in found.values():
        job = replace(job, config=replace(job.config, output_dir=str(smoke_runs)))
        result = run(job.config)
        assert result["status"] == "finished" and job.score("test_accuracy") is not None
        assert result["steps"] == (1 if "LeastSquares" in job.config.estimator["_target_"] else 2)
    assert found or not about["tables"]


def test_the_page_of_reproduction_is_up_to_date():
    assert (ROOT / "docs/reproduce.md").read_text() == reproduce_page.page()
