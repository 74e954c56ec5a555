"""Tables from presets and results: what is run, what is shown, and what is said of what is missing."""

import json
import sys

import pytest
from conftest import ROOT

from dpopt import store

sys.path.insert(0, str(ROOT / "scripts"))
import make_tables

NAMES = sorted(p.stem for p in (ROOT / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_table_names_presets_that_sweep(name):
    about = make_tables.read(name)
    assert about["title"] and about["setting"] and about["tables"]
    lines = make_tables.commands(name)
    assert len(lines) == len(set(lines)) >= len(about["tables"])
    assert all("seed=" in line and "run.py +experiment=" in line for line in lines)


def test_rows_are_what_a_preset_sweeps(tmp_path):
    """DP-PSASC: two optimizers, four s, at a sensitivity of 1."""
    found = make_tables.jobs("table_digits_psasc", "epsilon", ["seed=0", "epsilon=1,8", f"output_dir={tmp_path}"])
    assert len(found) == 2 * 4 * 2 and len({store.run_name(job.config) for job in found}) == 16
    assert {job.column for job in found} == {"1", "8"} and {job.config.seed for job in found} == {0}
    assert all(job.config.clip_norm == job.config.clipping["s"] for job in found)
    assert found[0].row == "optimizer=dp_sgd, clipping.s=1"
    names = {job.row for job in make_tables.jobs("table_digits_optimizers", "epsilon", ["seed=0", "epsilon=8"])}
    assert names == {p.stem for p in (ROOT / "conf/optimizer").glob("*.yaml")}


def test_cells_say_what_is_missing(tmp_path):
    found = make_tables.jobs(
        "table_digits_psasc_flat", "epsilon", ["seed=0,1", "epsilon=1,8", f"output_dir={tmp_path}"]
    )
    scores = {("dp_sgd", "1", 0): 0.5, ("dp_sgd", "1", 1): 0.6, ("dp_sgd", "8", 0): 0.7}
    for job in found:
        directory = store.locate(job.config)
        if (score := scores.get((job.row, job.column, job.config.seed))) is not None:
            directory.mkdir()
            (directory / store.RESULT).write_text(json.dumps({"status": "finished", "test_accuracy": score}))
        elif (job.row, job.column) == ("dp_psasc_momentum", "8"):
            directory.mkdir()
            (directory / store.ERROR).write_text("ValueError: too bad\n")
    text, runs, best = make_tables.table(found, "epsilon", "test_accuracy")
    assert text.splitlines()[2:] == [
        "| `dp_sgd` | 55.0 ± 7.1 | 70.0 (n = 1) |",
        "| `dp_psasc_momentum` | not run | failed: ValueError: too bad |",
    ]
    assert len(runs) == 8 and sum(run["status"] == "finished" for run in runs) == 3 and best == "dp_sgd"
