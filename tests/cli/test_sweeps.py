"""Sweeps: what is finished stays, what fails is named, jobs run side by side; and a run is made again."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

from dpopt.cli.rerun import verdict
from dpopt.runs import directory as run_files

pytestmark = pytest.mark.slow


def test_a_table_survives_an_interruption_and_a_failing_cell(command, tmp_path):
    """Two cells, then more: the finished ones keep their files; one that cannot run is named with its error."""
    words = ["train", "-m", "experiment=quickstart", "size=smoke", f"output_dir={tmp_path}", "randomness=research"]

    def sweep(*more):
        return command(*words, *more)

    assert sweep("optimizer=dp_sgd,dp_psasc_momentum", "seed=0").returncode == 0
    first = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/result.json")}
    assert len(first) == 2
    again = sweep("seed=0,1", "optimizer=dp_sgd,dp_adam", "++optimizer.momentum=0")  # no such argument of Adam
    assert again.returncode == 1 and "optimizer.momentum" in again.stdout + again.stderr
    assert len(list(tmp_path.glob("*/result.json"))) > len(first)
    assert all(path.stat().st_mtime_ns == when for path, when in first.items())
    reasons = [path.read_text() for path in (tmp_path / ".sweeps").glob("*.txt")]
    assert reasons and all("momentum is not an argument" in reason for reason in reasons)


def test_a_rerun_agrees_and_says_when_it_does_not(command, tmp_path):
    words = ["train", "experiment=quickstart", "steps=3", "eval_every=3", "optimizer=dp_sgd", f"output_dir={tmp_path}"]
    words += ["randomness=research"]
    assert command(*words).returncode == 0
    (directory,) = [path.parent for path in tmp_path.glob("*/result.json")]
    done = command("rerun", str(directory))
    assert done.returncode == 0 and "agrees bit by bit" in done.stdout, done.stdout + done.stderr
    result = json.loads((directory / run_files.RESULT).read_text())
    far = result | {"test_accuracy": min(1.0, result["test_accuracy"] + 0.5)}
    assert verdict(far, result, False, 360)[0] is False
    assert "accounting has changed" in verdict(result, result | {"epsilon": 9.0}, False, 360)[1]
    onto = command("rerun", str(directory), "--output", str(tmp_path))
    assert onto.returncode == 1 and "holds this run, finished" in onto.stderr
    other = verdict(result, result | {"run": "another", "test_loss": 0.0}, False, 360)
    assert other[0] and other[1].endswith(" now (the draws are others: they are keyed by the configuration)")
    older = verdict(result | {"noise_version": 1}, result, False, 360)
    assert older[0] and older[1].endswith(" now (the draws are others: noise version 1 then, 3 now)")
    missing = command("rerun", str(tmp_path))
    assert missing.returncode == 1 and "no finished run" in missing.stderr


def test_a_sweep_adds_up_its_plans_and_jobs_take_turns_on_gpus(command, tmp_path, monkeypatch):
    import torch
    from hydra import compose, initialize_config_dir

    from dpopt.runs.sweep import cost, side_by_side
    from dpopt.training.build import make_device

    plans = [{"status": "planned", "seconds": 5400, "memory_bytes": 2e9}, {"status": "finished", "seconds": 60}]
    plans.append({"status": "planned", "seconds": 5400, "memory_bytes": 3e9})
    text = cost(plans, 1)
    assert text.startswith("4 runs, 1 of them finished · 1 refused · about 3 h") and "up to 3 GB" in text
    assert "unknown" in cost([{"status": "planned", "seconds": None, "memory_bytes": None}])
    results = [
        (["a=1", "b=1"], {"status": "finished", "test_accuracy": 0.5, "epsilon": 8.0, "wall_seconds": 3}),
        (["a=1", "b=22"], {"status": "failed", "error": "no such thing"}),
    ]
    lines = side_by_side(results).splitlines()[1:]
    assert lines == ["b=1     50.00%   ε = 8        3 s", "b=22   failed: no such thing"]
    assert side_by_side(results[1:] * 2).splitlines()[0] == "sweep: test accuracy, ε spent, time"
    results += [(["a=1", "b=3"], results[0][1] | {"private/holdout_accuracy": 0.25})]
    assert side_by_side(results).splitlines() == [
        "sweep: accuracy on the hold-out, ε spent, time",
        "b=1          –   ε = 8        3 s",
        "b=22   failed: no such thing",
        "b=3     25.00%   ε = 8        3 s",
    ]
    unmeasured = [(words, result | {"config": {"holdout": 0.2}}) for words, result in results[:2]]
    assert "diagnostics=true measures the hold-out" in side_by_side(unmeasured).splitlines()[-1]
    assert "diagnostics" not in side_by_side([*unmeasured, *results[2:]])
    done = command("estimate", "-m", "experiment=quickstart", "seed=0,1")
    assert "sweep: 2 runs, 0 of them finished · about" in done.stdout, done.stdout + done.stderr

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for job, index in (("0", 0), ("5", 1)):
        monkeypatch.setenv("DPOPT_JOB", job)
        assert make_device("auto") == torch.device("cuda", index)
    monkeypatch.delenv("DPOPT_JOB")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        hydra = compose("config", ["experiment=quickstart", "hydra.job.num=3"], return_hydra_config=True)
    assert str(hydra.hydra.job.env_set.DPOPT_JOB) == "3"


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_sweeps_run_in_parallel_by_one_override(launcher, tmp_path):
    workers = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    words = ["-m", "experiment=quickstart", "size=smoke", "seed=0,1", "dataset=digits", f"output_dir={tmp_path}"]
    command = [sys.executable, "run.py", *words, f"hydra/launcher={launcher}", *workers]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob("*/result.json"))) == 2
    *_, head, first, second = done.stdout.splitlines()
    assert head == "sweep: test accuracy, ε spent, time"
    assert first.startswith("seed=0 ") and second.startswith("seed=1 ")
    left = [path.name for path in (tmp_path / ".sweeps").glob(".*")]
    assert set(left) <= {".submitit"}  # what the jobs passed on is gone
    bad = subprocess.run([*command, "delta=2"], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 1 and bad.stdout.splitlines()[-1].startswith("seed=1   failed: delta=2.0 must be a prob")


def test_a_job_array_with_a_gpu_per_run_is_one_override():
    from hydra import compose, initialize_config_dir

    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        launcher = compose("config", ["hydra/launcher=slurm"], return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith(".SlurmLauncher") and launcher.gpus_per_node == 1


def test_a_job_array_without_slurm_is_refused(command, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    done = command("train", "-m", "experiment=quickstart", "hydra/launcher=slurm", "seed=0,1")
    assert done.returncode == 1 and done.stderr.startswith("hydra/launcher=slurm needs SLURM's srun, which is not on")
    assert done.stderr.count("\n") == 1


# A cluster of one machine: the jobs of an array run one after the other.
SLURM = {
    "sbatch": r"""
        for file; do true; done
        cp "$file" "$PLAYED/submitted"
        export SLURM_ARRAY_JOB_ID=7 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=localhost
        export SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_PROCID=0
        last=$(sed -n 's/^#SBATCH --array=0-\([0-9]*\).*/\1/p' "$file")
        for i in $(seq 0 "$last"); do
            SLURM_JOB_ID=$((100 + i)) SLURM_ARRAY_TASK_ID=$i sh "$file"
        done >"$PLAYED/log" 2>&1 &
        echo Submitted batch job 7""",
    "srun": """
        while true; do case "$1" in --output | --error) shift 2 ;; -*) shift ;; *) break ;; esac; done
        exec "$@" """,
    "sacct": r"printf 'JobID|State|NodeList\n7_0|RUNNING|localhost\n7_1|RUNNING|localhost\n'",
}


def test_the_guides_command_makes_a_job_array(tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    for name, script in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PLAYED", str(tmp_path))
    guide = (ROOT / "docs/several_devices.md").read_text().splitlines()
    (line,) = [line for line in guide if line.startswith("python run.py -m") and "hydra/launcher=slurm" in line]
    python, *words = shlex.split(line)
    words = ["seed=0,1" if w.startswith("seed=") else "optimizer=dp_sgd" if "glob" in w else w for w in words]
    assert python == "python" and words[:2] == ["run.py", "-m"] and "hydra.launcher.partition=NAME" in words
    smaller = ["size=smoke", "dataset=digits", "hydra.launcher.timeout_min=600", f"output_dir={tmp_path}/runs"]
    done = subprocess.run([sys.executable, *words, *smaller], cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[-2:]] == ["seed=0", "seed=1"]
    assert len(list(tmp_path.glob("runs/*/result.json"))) == 2
    submitted = (tmp_path / "submitted").read_text()
    for option in ("--array=0-1%", "--gpus-per-node=1", "--partition=NAME", "--time=600"):
        assert f"#SBATCH {option}" in submitted
