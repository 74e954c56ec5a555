"""Trackers: offline by default, dropped when they fail, and no effect on the result."""

import json
import os
import struct
import subprocess
import sys

import pytest
from helpers import ROOT

from dpopt.runs.tracking import CsvOnly, Metrics

pytestmark = pytest.mark.slow

SHORT = ("experiment=quickstart", "steps=4", "batch_size=64", "eval_every=2", "epsilon=1", "randomness=research")


class Broken:
    """Fails in one of its methods, and remembers what it was asked."""

    def __init__(self, where):
        self.where, self.calls = where, []

    def _call(self, name):
        self.calls.append(name)
        if name == self.where:
            raise RuntimeError(f"{name} is broken")

    def start(self, directory, name, config, resumed):
        self._call("start")

    def log(self, step, values):
        self._call("log")

    def finish(self):
        self._call("finish")


@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_a_broken_tracker_costs_one_line(tmp_path, capsys, where):
    tracker = Broken(where)
    metrics = Metrics(tmp_path / "metrics.csv", 0, tracker, "name", {})
    for step in (1, 2):
        metrics.log(step, {"a": 0.1 * step}, {"unsaved": 1.0})
    metrics.close()
    assert capsys.readouterr().err.count("\n") == 1
    assert tracker.calls[-1] == where and tracker.calls.count(where) == 1
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,a", "1,0.1", "2,0.2"]


def test_rows_beyond_the_checkpoint_are_cut_off(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = Metrics(path, 0, CsvOnly(), "name", {})
    metrics.log(1, {"a": 1.0}, {})
    rows = metrics.sync()
    metrics.log(2, {"a": 2.0}, {})
    metrics.close()
    again = Metrics(path, rows, CsvOnly(), "name", {})
    again.log(2, {"a": 3.0, "b": 9.0}, {})  # diagnostics were switched on
    again.log(3, {"a": 4.0}, {})  # and off
    again.close()
    assert path.read_text().splitlines() == ["step,a,b", "1,1.0,", "2,3.0,9.0", "3,4.0,"]


def test_a_lost_file_is_begun_anew(tmp_path, capsys):
    metrics = Metrics(tmp_path / "metrics.csv", 7, CsvOnly(), "name", {})
    metrics.log(8, {"a": 1.0}, {})
    metrics.close()
    assert "has lost rows" in capsys.readouterr().err
    assert (tmp_path / "metrics.csv").read_text() == "step,a\n8,1.0\n"


def result_of(tmp_path):
    result = next(json.loads(p.read_text()) for p in tmp_path.glob("runs/*/result.json"))
    return {k: result[k] for k in ("test_accuracy", "test_loss", "epsilon", "run")}


def test_wandb_offline_holds_the_series(cli, tmp_path):
    done = cli(*SHORT, "logger=wandb")
    assert done.returncode == 0 and done.stderr.count("dpopt:") == 1, done.stderr
    assert "to upload: wandb sync" in done.stderr
    files = list(tmp_path.glob("runs/*/wandb/offline-run-*/*.wandb"))
    assert len(files) == 1
    content = files[0].read_bytes()
    for series in (b"test/accuracy", b"privacy/epsilon", b"memory/peak_bytes", b"memory/optimizer_state_bytes"):
        assert series in content


def test_without_wandb_the_result_is_the_same(cli, tmp_path):
    assert cli(*SHORT, "logger=csv").returncode == 0
    expected = result_of(tmp_path)
    blocker = tmp_path / "blocked"
    (blocker / "wandb").mkdir(parents=True)
    (blocker / "wandb" / "__init__.py").write_text("raise ImportError('no wandb here')\n")
    done = cli(*SHORT, "logger=wandb", "fresh=true", PYTHONPATH=str(blocker))
    assert done.returncode == 0 and "no wandb here" in done.stderr and done.stderr.count("dpopt:") == 1
    assert result_of(tmp_path) == expected


def test_a_dead_server_is_waited_for_once_per_sweep(cli, tmp_path):
    environment = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_MODE": "online"}
    done = cli("-m", *SHORT, "logger=wandb", "seed=0,1", **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("recording offline") == 1
    assert len(list(tmp_path.glob("runs/*/wandb/offline-run-*"))) == 2


def test_tensorboard(cli, tmp_path):
    done = cli(*SHORT, "logger=tensorboard")
    assert done.returncode == 0, done.stderr
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        assert "TensorBoard failed" in done.stderr
    else:
        assert list(tmp_path.glob("runs/*/tensorboard/*"))


def test_a_terminal_without_a_key_gets_no_prompt(tmp_path):
    """On a pseudo-terminal, with nothing typed."""
    arguments = [*SHORT, "logger=wandb", f"output_dir={tmp_path}/runs"]
    code = (
        "import pty, sys, os\n"
        f"status = pty.spawn([sys.executable, {str(ROOT / 'run.py')!r}, *{arguments!r}], stdin_read=lambda fd: b'')\n"
        "sys.exit(os.waitstatus_to_exitcode(status))"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout
    assert "wandb: (1)" not in done.stdout and list(tmp_path.glob("runs/*/wandb/offline-run-*"))


def offline_runs(folder):
    """(name, project, id, sweep, steps of its history) of every offline run below a folder, in order."""
    return [read_offline(path) for path in sorted(folder.rglob("*.wandb"), key=lambda path: path.parent.name)]


def read_offline(path):
    """W&B's file: a header, then records cut at blocks of 32 kB as LevelDB does, each a protobuf."""
    from wandb.proto import wandb_internal_pb2

    data, at, record, about, steps = path.read_bytes(), 7, b"", (), []
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            read = wandb_internal_pb2.Record.FromString(record)
            record = b""
            if read.WhichOneof("record_type") == "run":
                about = read.run.display_name, read.run.project, read.run.run_id, read.run.sweep_id
            elif read.WhichOneof("record_type") == "history":
                names = {".".join(item.nested_key) or item.key for item in read.history.item}
                assert "test/accuracy" in names
                steps.append(read.history.step.num)
    return (*about, steps)


def test_the_last_part_of_an_offline_run_holds_all_of_it(cli, tmp_path):
    """Uploading parts in turn, the last one replaces the others."""
    assert cli(*SHORT, "logger=wandb", "eval_every=1", "time_limit=0").returncode == 0
    assert cli(*SHORT, "logger=wandb", "eval_every=1").returncode == 0
    first, last = offline_runs(tmp_path)
    assert first[:4] == last[:4] and first[1] == "dpopt" and first[0] == first[2] == result_of(tmp_path)["run"]
    assert first[4] == [1] and last[4] == [1, 2, 3, 4]


def test_the_variables_of_wandb_count_and_an_agent_gets_the_metrics_of_a_finished_run(cli, tmp_path):
    assert cli(*SHORT, "logger=csv").returncode == 0
    assert cli(*SHORT, "logger=wandb").returncode == 0 and not offline_runs(tmp_path)
    own = {"WANDB_PROJECT": "ours", "WANDB_NAME": "mine", "WANDB_DIR": str(tmp_path / "there")}
    agent = {"WANDB_RUN_ID": "trial7", "WANDB_SWEEP_ID": "sweep1"}
    done = cli(*SHORT, "logger=wandb", **own, **agent)
    assert done.returncode == 0 and "finished:" in done.stdout, done.stderr
    assert offline_runs(tmp_path / "there") == [("mine", "ours", "trial7", "sweep1", [2, 4])]
    assert cli(*SHORT, "logger=wandb", "logger.project=theirs", "fresh=true", **own).returncode == 0
    name = result_of(tmp_path)["run"]
    assert offline_runs(tmp_path / "there")[1] == ("mine", "theirs", name, "", [2, 4])
