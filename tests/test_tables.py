"""Tables and figures of results: what a cell shows, what is compared, and what is said of what is missing."""

import csv
import json
import math
import sys
from dataclasses import asdict, replace

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import make_figures
import make_tables
import tables

from dpopt.runs import directory as run_files
from dpopt.runs.identity import locate
from dpopt.training.run import note_failure


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


def finish(job, **result):
    directory = locate(job.config)
    directory.mkdir(exist_ok=True)
    result = {"status": "finished", "config": asdict(job.config), **result}
    (directory / run_files.RESULT).write_text(json.dumps(result))


def fake(tmp_path, seeds="0,1,2"):
    words = ("experiment=table_digits_psasc_flat", f"seed={seeds}", "privacy=eps1,eps8", f"output_dir={tmp_path}")
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
            note_failure(job.config, ValueError("the data set is not there\nor damaged"))
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
    note_failure(job.config, ValueError("no data"))
    assert job.result() == {"status": "failed", "error": "no data"}
    locate(job.config).mkdir()
    assert job.result() == {"status": "unfinished"}
    dry = replace(fake(tmp_path, "1")[0], config=replace(job.config, seed=7, dry_run=True))
    note_failure(dry.config, ValueError("no data"))
    assert dry.result() == {"status": "not run"}


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
    (directory / run_files.RESULT).write_text(json.dumps({"status": "finished", "test_accuracy": 0.5, "config": old}))
    assert locate(config) == directory and replace(job, config=config).directory() == directory
    for other in (replace(config, ema=0.5), replace(config, optimizer={**config.optimizer, "weight_decay": 0.1})):
        assert locate(other) != directory


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
        with (job.directory() / run_files.METRICS).open("w", newline="") as file:
            csv.writer(file).writerows(lines)
    (found[-1].directory() / run_files.RESULT).unlink()  # interrupted: not in the curves
    with (found[-1].directory() / run_files.METRICS).open("a") as file:
        file.write("6,0.9,3\n")
    assert make_figures.by_epsilon(axis, found, {})
    one, other = (make_figures.plt.subplots()[1] for _ in range(2))
    assert make_figures.curves(one, found, {"column": "eps8"})
    assert [list(line.get_xdata()) for line in one.lines] == [[1, 2, 3, 4, 5]] * 2 and one.child_axes
    lines[1][-1] = 0.7  # another ε at the same step
    with (found[0].directory() / run_files.METRICS).open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    assert make_figures.curves(other, found, {"column": found[0].column}) and not other.child_axes
    assert make_figures.bars(axis, found, {})
    assert tables.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.484), abs=1e-3)
    assert math.isnan(tables.interval([1.0, 2.0])[1])
    make_figures.plt.close("all")
