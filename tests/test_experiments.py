"""What experiments/ and conf/experiment define: presets that run, sources, tuned rates, commands."""

import csv
import shlex
import subprocess
import sys

import pytest
import yaml
from helpers import ROOT

from dpopt.training.run import run

sys.path.insert(0, str(ROOT / "scripts"))
import make_figures
import make_reproduce
import make_tables
import tables

from dpopt.runs.identity import run_name

NAMES = tables.names()

PROTOCOL = {"what", "value", "source", "protocol", "dataset", "model", "train_size", "epsilon", "delta"}


@pytest.fixture
def nothing_run(monkeypatch):
    monkeypatch.setattr(tables.Job, "result", lambda job: {"status": "not run"})


@pytest.mark.parametrize("name", NAMES)
def test_every_table_is_complete_at_every_scale(name):
    """Presets exist and sweep; every published figure names its source and protocol and belongs to a cell."""
    about = tables.read(name)
    assert about["title"] and about["setting"] and set(about["scales"]) <= set(tables.SCALES)
    assert "smoke" in about["scales"] or name.endswith("_tuning")
    assert set(about["hours"]) == set(about["scales"]) - {"smoke"}
    for entry in about["tables"]:
        assert entry["title"] and all(
            set(row) <= {"preset", "label", "overrides", "at", "scales"} for row in entry["rows"]
        )
        for published in entry.get("published", []):
            assert set(published) >= PROTOCOL and published["source"] and published["protocol"]
    titles = {entry["title"] for entry in about["tables"]}
    for figure in about.get("figures", []):
        assert figure["kind"] in make_figures.KINDS and figure.get("table", "") in titles | {""}
    scale = about["scales"][0]
    if about["tables"]:
        text, tex, runs = make_tables.page(name, scale)
        cells = {(run["table"], run["row"], run["column"], run["seed"]) for run in runs}
        assert len(cells) == len(runs) > 0 and (scale != "smoke" or {run["seed"] for run in runs} == {0})
        assert "toprule" in tex and "Runs: `python run.py experiment=" in text


def test_published_figures_belong_to_rows():
    """At the scale that they are published for, their cells exist, but for those of methods that have no row."""
    for name, scale, missing in (("cifar10", "cpu", set()), ("views", "full", set()), ("imagenet", "full", {"eps8"})):
        about = tables.read(name)
        entry = about["tables"][0]
        cells = {(job.row, job.column) for job in tables.jobs(about, entry, scale)}
        for published in entry["published"]:
            assert (published["row"], published["column"]) in cells or published["column"] in missing


TUNED = {
    "digits_tuning": ("experiment=table_digits_optimizers",),
    "cifar10_tuning": ("experiment=table_cifar10", "size=cpu"),
}


@pytest.mark.parametrize("name", TUNED)
def test_tuned_learning_rates_are_the_best_of_their_table(name):
    with (ROOT / f"experiments/results/{name}.csv").open() as file:
        done = [line for line in csv.DictReader(file) if line["status"] == "finished"]
    scores: dict = {}
    for line in done:
        cell = line["table"], line["column"] if tables.read(name)["choose"] == "each" else "eps1"
        scores.setdefault(cell, {}).setdefault(float(line["row"]), []).append(float(line["private/holdout_accuracy"]))
    assert len(scores) >= 12
    for (table, column), rates in scores.items():
        optimizer, _, variant = table.partition(", ")
        if variant and not variant.startswith("batch"):
            continue  # a row that names its rate
        words = ("experiment=table_cifar10_large", "size=cpu") if variant else TUNED[name]
        (job,) = tables.expand((*words, f"optimizer={optimizer}", f"privacy={column}", "seed=0"), "privacy")
        means = {rate: sum(found) / len(found) for rate, found in rates.items()}
        assert means[float(job.config.optimizer["lr"])] > max(means.values()) - 1e-9, (table, column)


def test_rows_that_name_their_rate_name_the_best_on_the_hold_out():
    """Variants of DP-MicroAdam on CIFAR-10's features: the best of the tuning table of the same variant and budget."""

    def form(job):
        return {**job.config.optimizer, "lr": None}, job.column

    with (ROOT / "experiments/results/cifar10_tuning.csv").open() as file:
        scores = {(line["table"], line["row"], line["column"]): line for line in csv.DictReader(file)}
    tuning = tables.read("cifar10_tuning")
    entries = [entry for entry in tuning["tables"] if entry["title"].startswith("dp_microadam, ")]
    tried = [(job, scores[e["title"], job.row, job.column]) for e in entries for job in tables.jobs(tuning, e, "cpu")]
    checked = 0
    for name in ("cifar10", "ablation"):
        about = tables.read(name)
        entry = about["tables"][0]
        rows = [row for row in entry["rows"] if any("optimizer.lr=" in word for word in row.get("overrides", []))]
        for job in tables.jobs(about, {**entry, "rows": rows}, "cpu"):
            same = [(float(line["private/holdout_accuracy"]), one) for one, line in tried if form(one) == form(job)]
            _, best = max(same, key=lambda pair: pair[0])
            assert len(same) >= 3 and best.config.optimizer["lr"] == job.config.optimizer["lr"], job.row
            checked += 1
    assert checked == 3 * 3 + 4 * 5


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


PRESETS = sorted(p.stem for p in (ROOT / "conf/experiment").glob("*_*.yaml") if p.stem.startswith(("table_", "tune_")))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_at_the_smallest_scale(preset, tmp_path):
    """The first and the last of its rows, two steps of each."""
    jobs = tables.expand((f"experiment={preset}", "size=smoke", f"output_dir={tmp_path}"), "privacy")
    for job in (jobs[0], jobs[-1]):
        result = run(job.config)
        assert result["status"] == "finished" and result["steps"] == 2 and job.score("test_accuracy") is not None


def test_rows_are_what_a_preset_sweeps(tmp_path):
    """DP-PSASC: two optimizers, four s, at a sensitivity of 1."""
    words = ("experiment=table_digits_psasc", "seed=0", "privacy=eps1,eps8", f"output_dir={tmp_path}")
    found = tables.expand(words, "privacy", "psasc")
    assert len(found) == 2 * 4 * 2 and len({run_name(job.config) for job in found}) == 16
    assert {job.column for job in found} == {"eps1", "eps8"} and {job.config.seed for job in found} == {0}
    assert all(job.config.clip_norm == job.config.clipping["s"] for job in found)
    assert found[0].row == "psasc, optimizer=dp_sgd, s=1"
    names = {job.row for job in tables.expand(("experiment=table_digits_optimizers", "size=smoke"), "privacy")}
    assert names == {p.stem for p in (ROOT / "conf/optimizer").glob("*.yaml")}


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_presets_and_none_comes_twice(name, nothing_run):
    lines = tables.commands(name, tables.read(name)["scales"][0])
    assert len(lines) == len(set(lines)) and all("run.py experiment=" in line for line in lines)
    assert bool(lines) == bool(tables.read(name)["tables"])


def test_every_command_survives_the_shells_on_its_way(tmp_path, nothing_run):
    """As the Makefile sends them: what arrives is what was meant, `${steps}` included."""
    recipe = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "--commands" in line)
    pipe = recipe[recipe.index("| ") + 2 :].replace("$(JOBS)", "1").replace("OMP_NUM_THREADS=1 ", "")
    for name in ("ablation", "digits"):
        lines = tables.commands(name, tables.read(name)["scales"][-1])
        harmless = [line.replace(f"{sys.executable} run.py", "printf '%s\\n'").split(" >>")[0] for line in lines]
        done = subprocess.run(
            ["sh", "-c", pipe], input="\n".join(harmless), capture_output=True, text=True, cwd=tmp_path
        )
        wanted = [word for line in lines for word in shlex.split(line.split(" >>")[0])[2:]]
        assert done.stdout.splitlines() == wanted, done.stderr
    assert any("${steps}" in line for line in tables.commands("ablation", "full"))


def test_commands_make_the_missing_runs_of_the_scale_and_no_others(monkeypatch, nothing_run):
    found = [shlex.split(line.split(" >>")[0])[2:] for line in tables.commands("cifar10", "cpu")]
    presets = ("table_cifar10", "table_cifar10", "table_cifar10_controls", "table_cifar10_large")  # window 1: once more
    wanted = sorted((f"experiment={preset}", f"seed={seed}") for preset in presets for seed in range(3))
    assert sorted((words[0], words[-1]) for words in found) == wanted

    def done(job):
        return {"status": "not run" if (job.row, job.config.seed) == ("dp_adamw", 2) else "finished"}

    monkeypatch.setattr(tables.Job, "result", done)
    (line,) = tables.commands("cifar10", "cpu")
    assert "experiment=table_cifar10 " in line and "seed=2 " in line


def test_the_page_of_reproduction_is_up_to_date():
    assert (ROOT / "docs/reproduce.md").read_text() == make_reproduce.page()
