"""Tables from presets and results: what is run, what is shown, and what is said of what is missing."""

import csv
import json
import math
import shlex
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import yaml
from conftest import ROOT

from dpopt import store
from dpopt.train import run

sys.path.insert(0, str(ROOT / "scripts"))
import make_figures
import make_reproduce
import make_tables
import tables

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
        assert "toprule" in tex and "Runs: `python run.py +experiment=" in text


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_presets_and_none_comes_twice(name, nothing_run):
    lines = tables.commands(name, tables.read(name)["scales"][0])
    assert len(lines) == len(set(lines)) and all("run.py +experiment=" in line for line in lines)
    assert bool(lines) == bool(tables.read(name)["tables"])


TUNED = {
    "digits_tuning": ("+experiment=table_digits_optimizers",),
    "cifar10_tuning": ("+experiment=table_cifar10", "+scale=cpu"),
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
        if variant in ("no error feedback", "window 1"):
            continue  # rows that name their rate
        words = ("+experiment=table_cifar10_large", "+scale=cpu") if variant else TUNED[name]
        (job,) = tables.expand((*words, f"optimizer={optimizer}", f"privacy={column}", "seed=0"), "privacy")
        means = {rate: sum(found) / len(found) for rate, found in rates.items()}
        assert means[float(job.config.optimizer["lr"])] > max(means.values()) - 1e-9, (table, column)


PRESETS = sorted(p.stem for p in (ROOT / "conf/experiment").glob("*_*.yaml") if p.stem.startswith(("table_", "tune_")))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_at_the_smallest_scale(preset, tmp_path):
    """The first and the last of its rows, two steps of each."""
    jobs = tables.expand((f"+experiment={preset}", "+scale=smoke", f"output_dir={tmp_path}"), "privacy")
    for job in (jobs[0], jobs[-1]):
        result = run(job.config)
        assert result["status"] == "finished" and result["steps"] == 2 and job.score("test_accuracy") is not None


def test_published_figures_belong_to_rows():
    """At the scale that they are published for, their cells exist, but for those of methods that have no row."""
    for name, scale, missing in (("cifar10", "cpu", set()), ("views", "full", set()), ("imagenet", "full", {"eps8"})):
        about = tables.read(name)
        entry = about["tables"][0]
        cells = {(job.row, job.column) for job in tables.jobs(about, entry, scale)}
        for published in entry["published"]:
            assert (published["row"], published["column"]) in cells or published["column"] in missing


def test_a_published_figure_is_compared_only_where_the_setting_is_the_same():
    about = tables.read("cifar10")
    entry = about["tables"][0]
    one, *_ = entry["published"]
    assert (one["row"], one["column"], one["value"], one["train_size"]) == ("dp_microadam", "eps8", 71.4, 45_000)
    for scale, expected in (("full", True), ("cpu", False)):
        words = tables.overrides_of(about, entry, entry["rows"][0], scale)
        jobs = tables.expand((*words, "optimizer=dp_microadam", "privacy=eps8", "seed=0"), "privacy")
        assert len(jobs) == 1 and make_tables.agrees(one, jobs) is expected
        if expected:
            for change in ({"epsilon": 3}, {"delta": 1e-6}, {"train_size": 50_000}, {"model": "wrn_40_4"}):
                assert not make_tables.agrees(one | change, jobs)


def test_rows_are_what_a_preset_sweeps(tmp_path):
    """DP-PSASC: two optimizers, four s, at a sensitivity of 1."""
    words = ("+experiment=table_digits_psasc", "seed=0", "privacy=eps1,eps8", f"output_dir={tmp_path}")
    found = tables.expand(words, "privacy", "psasc")
    assert len(found) == 2 * 4 * 2 and len({store.run_name(job.config) for job in found}) == 16
    assert {job.column for job in found} == {"eps1", "eps8"} and {job.config.seed for job in found} == {0}
    assert all(job.config.clip_norm == job.config.clipping["s"] for job in found)
    assert found[0].row == "psasc, optimizer=dp_sgd, s=1"
    names = {job.row for job in tables.expand(("+experiment=table_digits_optimizers", "+scale=smoke"), "privacy")}
    assert names == {p.stem for p in (ROOT / "conf/optimizer").glob("*.yaml")}


def finish(job, **result):
    directory = store.locate(job.config)
    directory.mkdir(exist_ok=True)
    result = {"status": "finished", "config": asdict(job.config), **result}
    (directory / store.RESULT).write_text(json.dumps(result))


def fake(tmp_path, seeds="0,1,2"):
    words = ("+experiment=table_digits_psasc_flat", f"seed={seeds}", "privacy=eps1,eps8", f"output_dir={tmp_path}")
    return tables.expand(words, "privacy")


def test_cells_say_what_is_missing(tmp_path):
    tables._finished.cache_clear()
    found = fake(tmp_path)
    scores = {("dp_sgd", "eps1"): (0.5, 0.6, 0.55), ("dp_sgd", "eps8"): (0.7, 0.7, None)}
    for job in found:
        score = scores.get((job.row, job.column), (None,) * 3)[job.config.seed]
        if score is not None:
            finish(job, test_accuracy=score)
        elif (job.row, job.column) == ("dp_psasc_momentum", "eps8"):
            store.note_failure(job.config, ValueError("the data set is not there\nor damaged"))
    rows, columns, cells = make_tables.arrange(found)
    with pytest.raises(ValueError, match="two runs are row dp_sgd, eps1, seed 0: give a row a label"):
        make_tables.arrange([*found, found[0]])
    assert rows == ["dp_sgd", "dp_psasc_momentum"] and columns == ["eps1", "eps8"]
    numbers = [replace(found[0], row=row) for row in ("0.3", "10", "1e-3")]
    assert make_tables.arrange(numbers)[0] == ["1e-3", "0.3", "10"]
    shown = {at: make_tables.cell(jobs, "test_accuracy") for at, jobs in cells.items()}
    assert shown == {
        ("dp_sgd", "eps1"): "55.0 ± 5.0 (n = 3)",
        ("dp_sgd", "eps8"): "70.0 ± 0.0 (n = 2)",
        ("dp_psasc_momentum", "eps1"): "not run",
        ("dp_psasc_momentum", "eps8"): "failed: the data set is not there",
    }


def test_conclusions_wait_for_all_runs_of_their_scale(tmp_path, monkeypatch):
    tables._finished.cache_clear()
    row = {"preset": "table_digits_psasc_flat", "overrides": ["seed=0", "privacy=eps8", f"output_dir={tmp_path}"]}
    part = {"title": "Accuracy", "rows": [row], "conclusions": {"full": "Nothing differs."}}
    about = {"title": "Mine", "setting": "Digits.", "column": "privacy", "scales": ["cpu", "full"], "tables": [part]}
    monkeypatch.setattr(tables, "read", lambda name: about)
    for job in tables.jobs(about, part, "full"):
        assert "Nothing differs." not in make_tables.page("mine", "full")[0]
        finish(job, test_accuracy=0.5, wall_seconds=1, git_commit="c0ffee", device="cpu")
    assert "Nothing differs." in make_tables.page("mine", "full")[0]
    part["conclusions"] = {"cpu": "Nothing differs."}
    assert "Nothing differs." not in make_tables.page("mine", "full")[0]


def test_a_loss_that_is_not_finite_is_a_cell_like_any_other(tmp_path):
    tables._finished.cache_clear()
    found = [job for job in fake(tmp_path) if (job.row, job.column) == ("dp_sgd", "eps1")]
    for job in found:
        finish(job, test_loss=float("nan") if job.config.seed else 1.0)
    assert make_tables.cell(found, "test_loss") == "diverged (2 of 3)"
    assert make_tables.difference(found, found, "test_loss") == "" and make_tables.cell(found, "no such") == "not run"


def test_a_failure_is_forgotten_once_the_run_begins(tmp_path):
    tables._finished.cache_clear()
    job = fake(tmp_path, "0")[0]
    store.note_failure(job.config, ValueError("no data"))
    assert job.result() == {"status": "failed", "error": "no data"}
    store.locate(job.config).mkdir()
    assert job.result() == {"status": "unfinished"}
    dry = replace(fake(tmp_path, "1")[0], config=replace(job.config, seed=7, dry_run=True))
    store.note_failure(dry.config, ValueError("no data"))
    assert dry.result() == {"status": "not run"}


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
    presets = ("table_cifar10", "table_cifar10_controls", "table_cifar10_large")
    wanted = [(f"+experiment={preset}", f"seed={seed}") for preset in presets for seed in range(3)]
    assert sorted((words[0], words[-1]) for words in found) == wanted

    def done(job):
        return {"status": "not run" if (job.row, job.config.seed) == ("dp_adamw", 2) else "finished"}

    monkeypatch.setattr(tables.Job, "result", done)
    (line,) = tables.commands("cifar10", "cpu")
    assert "+experiment=table_cifar10 " in line and "seed=2 " in line


def test_tables_are_not_overwritten_by_emptier_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make_tables.py", "psasc", "--scale", "full", "--output", str(tmp_path)])
    assert make_tables.main() == 0 and (tmp_path / "psasc.md").exists()
    with (tmp_path / "psasc.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["status"], ["finished"]])
    (tmp_path / "psasc.md").write_text("kept")
    assert make_tables.main() == 0 and (tmp_path / "psasc.md").read_text() == "kept"
    assert "--force overwrites" in capsys.readouterr().out
    monkeypatch.setattr(make_figures, "draw", lambda *_: pytest.fail("drew figures of fewer runs"))
    assert make_figures.main() == 0 and "another folder with --output" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--force"])
    assert make_tables.main() == 0 and (tmp_path / "psasc.md").read_text() != "kept"
    monkeypatch.setattr(sys, "argv", ["make_tables.py", "rate", "--output", str(tmp_path)])
    assert make_tables.main() == 0 and not (tmp_path / "rate.md").exists()


def test_differences_are_paired_by_seed(tmp_path):
    """By hand: differences 1, 2, 3 points: mean 2, sd 1, t(.975, 2) = 4.303, half = 4.303/√3."""
    tables._finished.cache_clear()
    found = fake(tmp_path)
    for job in found:
        gain = 0.01 * (job.config.seed + 1) if job.row == "dp_psasc_momentum" else 0.0
        finish(job, test_accuracy=0.5 + 0.1 * job.config.seed + gain)
    _, _, cells = make_tables.arrange(found)
    one, other = cells["dp_psasc_momentum", "eps8"], cells["dp_sgd", "eps8"]
    assert make_tables.difference(one, other, "test_accuracy") == "+2.0 [-0.5, +4.5]"
    assert 4.3027 / math.sqrt(3) == pytest.approx(2.484, abs=1e-3)
    assert make_tables.difference(one[:2], other, "test_accuracy") == "+1.5 (n = 2: no interval)"
    assert make_tables.difference(one, other[2:], "test_accuracy") == "+3.0 (n = 1: no interval)"
    fourth = replace(one[0], config=replace(one[0].config, seed=3))  # without a partner
    assert make_tables.difference([*one, fourth], other, "test_accuracy") == "+2.0 [-0.5, +4.5] (n = 3)"
    assert [make_tables.bound(value, 1) for value in (-0.009, 0.04, 0.0, -1.25)] == ["-0.01", "+0.04", "+0.0", "-1.2"]


def test_the_best_row_is_chosen_on_average_or_by_column(tmp_path):
    tables._finished.cache_clear()
    found = fake(tmp_path, "0")
    scores = {("dp_sgd", "eps1"): 0.4, ("dp_sgd", "eps8"): 0.9, ("dp_psasc_momentum", "eps1"): 0.6}
    for job in found:
        if (job.row, job.column) in scores:
            finish(job, test_accuracy=scores[job.row, job.column])
    rows, columns, cells = make_tables.arrange(found)
    assert make_tables.chosen(rows, columns, cells, "test_accuracy", "average") == "Not decided: runs are missing."
    finish(cells["dp_psasc_momentum", "eps8"][0], test_accuracy=0.65)
    assert make_tables.chosen(rows, columns, cells, "test_accuracy", "average") == "Best on average: dp_sgd."
    each = make_tables.chosen(rows, columns, cells, "test_accuracy", "each")
    assert each == "Best: dp_psasc_momentum at ε = 1, dp_sgd at ε = 8."


def test_finished_runs_stay_finished_when_keys_are_added(tmp_path):
    """A key of the root or of a component that is younger than a result has its default in it."""
    tables._finished.cache_clear()
    job = fake(tmp_path, "0")[0]
    old = asdict(job.config)
    del old["ema"], old["checkpoint_every"], old["optimizer"]["weight_decay"]
    config = replace(job.config, ema=None)  # ema's default
    directory = tmp_path / "older"
    directory.mkdir()
    (directory / store.RESULT).write_text(json.dumps({"status": "finished", "test_accuracy": 0.5, "config": old}))
    assert store.locate(config) == directory and replace(job, config=config).directory() == directory
    for other in (replace(config, ema=0.5), replace(config, optimizer={**config.optimizer, "weight_decay": 0.1})):
        assert store.locate(other) != directory


def test_delta_above_one_over_n_is_flagged():
    about = tables.read("imagenet")
    flagged = {}
    for entry in about["tables"]:
        _, _, cells = make_tables.arrange(tables.jobs(about, entry, "full"))
        flagged[entry["title"]] = make_tables.flags(cells)
    assert ["above 1/N" in text for text in flagged["Private, ResNet-50"]] == [True]
    assert not flagged["Without privacy, ResNet-18"]


def test_figures_are_drawn_of_what_there_is(tmp_path):
    tables._finished.cache_clear()
    axis = make_figures.plt.subplots()[1]
    found = fake(tmp_path)
    assert not make_figures.by_epsilon(axis, found, {})
    for job in found:
        finish(job, test_accuracy=0.5 + 0.01 * job.config.seed, optimizer_state_bytes=80, trainable_parameters=10)
        lines = [["step", "test/accuracy", "privacy/epsilon"], *([s, 0.1 * s, s / 2] for s in range(1, 6))]
        with (job.directory() / store.METRICS).open("w", newline="") as file:
            csv.writer(file).writerows(lines)
    (found[-1].directory() / store.RESULT).unlink()  # interrupted: not in the curves
    with (found[-1].directory() / store.METRICS).open("a") as file:
        file.write("6,0.9,3\n")
    assert make_figures.by_epsilon(axis, found, {})
    one, other = (make_figures.plt.subplots()[1] for _ in range(2))
    assert make_figures.curves(one, found, {"column": "eps8"})
    assert [list(line.get_xdata()) for line in one.lines] == [[1, 2, 3, 4, 5]] * 2 and one.child_axes
    lines[1][-1] = 0.7  # another ε at the same step
    with (found[0].directory() / store.METRICS).open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    assert make_figures.curves(other, found, {"column": found[0].column}) and not other.child_axes
    assert make_figures.bars(axis, found, {})
    assert tables.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.484), abs=1e-3)
    assert math.isnan(tables.interval([1.0, 2.0])[1])
    make_figures.plt.close("all")


def test_the_page_of_reproduction_is_up_to_date():
    assert (ROOT / "docs/reproduce.md").read_text() == make_reproduce.page()


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
