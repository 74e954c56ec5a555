"""Training from the command line: results, resume after kill -9, sweeps."""

import csv
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, configure

import dpopt
import dpopt.training.run
from dpopt import files

pytestmark = pytest.mark.slow

# The quickstart, shrunk to a few seconds. Small noise is dear to account for, hence ε = 1.
SHORT = (
    "experiment=quickstart",
    "steps=6",
    "batch_size=64",
    "eval_every=2",
    "checkpoint_every=2",
    "ema=0.5",
    "epsilon=1",
    "randomness=research",
)


def only_run(tmp_path: Path) -> Path:
    runs = [p.parent for p in (tmp_path / "runs").glob("*/config.yaml")]
    assert len(runs) == 1
    return runs[0]


def rows(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(file)]


def test_result_and_files(command, tmp_path):
    done = command("train", *SHORT, "diagnostics=true", "holdout=0.1", "time_limit=1000")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") < 30 and "result" in done.stdout and "step 6/6" in done.stdout
    run = only_run(tmp_path)
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "finished" and 0 <= result["test_accuracy"] <= 1
    assert result["dataset_size"] == 1293 and result["steps"] == 6 and result["seed"] == 0
    assert 1 - 1e-4 <= result["epsilon"] <= 1 < result["epsilon_rdp"]
    assert result["sample_rate"] == 64 / 1293 and result["noise_multiplier"] > 0
    assert result["parameters"] == 21_578 and result["optimizer_state_bytes"] > 0 < result["peak_memory_bytes"]
    assert result["examples_per_second"] > 0 < result["wall_seconds"] and result["test_loss"] > 0
    assert {"delta", "git_commit", "versions", "device", "config"} <= set(result)
    for name in ("metrics.csv", "privacy_card.md", "checkpoint.pt", "model.safetensors"):
        assert (run / name).stat().st_size > 0
    assert "private/" in (run / "privacy_card.md").read_text()
    table = rows(run)
    assert [row["step"] for row in table] == ["2", "4", "6"]
    assert {"private/train_loss", "private/holdout_accuracy", "private/clipped_fraction"} <= set(table[0])
    assert float(table[-1]["privacy/epsilon"]) == result["epsilon"]
    assert float(table[-1]["private/holdout_accuracy"]) == result["private/holdout_accuracy"]

    model = dpopt.load(run)
    assert not model.training and sum(p.numel() for p in model.parameters()) == 21_578
    seen = command("evaluate", str(run))
    assert f"accuracy {result['test_accuracy']:.4%}" in seen.stdout, seen.stderr
    assert command("evaluate", str(run), "nowhere").stdout == seen.stdout  # digits need no folder
    beams = command("evaluate", str(run), "--beams", "4")
    assert beams.returncode == 1 and "add --write N" in beams.stderr
    missing = command("evaluate", str(tmp_path))
    assert missing.returncode == 1 and "holds no model.safetensors" in missing.stderr


def test_nothing_private_is_recorded_by_default(command, tmp_path):
    assert command("train", *SHORT, "holdout=0.1").returncode == 0
    run = only_run(tmp_path)
    assert set(rows(run)[0]) == {
        *("step", "test/accuracy", "test/loss", "privacy/epsilon", "memory/optimizer_state_bytes"),
        *("optimizer/lr", "optimizer/effective_step", "optimizer/moved_fraction", "optimizer/moment_fluctuation"),
        *("optimizer/grad_norm", "optimizer/error_feedback_norm", "optimizer/quantization_omega"),
        *("optimizer/contraction", "optimizer/left_behind", "optimizer/window_mass"),
    }
    assert "diagnostics" not in (run / "privacy_card.md").read_text()


def test_controls(command, tmp_path):
    for control in (["privacy=none", "epsilon=null"], ["epsilon=inf"], ["privacy=eps1"]):
        done = command("train", *SHORT, *control)
        assert done.returncode == 0, done.stderr
    cards = {p.parent.name.split("-")[3]: p.read_text() for p in (tmp_path / "runs").glob("*/privacy_card.md")}
    results = {p.parent.name.split("-")[3]: files.read_json(p) for p in (tmp_path / "runs").glob("*/result.json")}
    assert set(cards) == {"nonprivate", "eps1", "epsinf"}
    assert "not private" in cards["nonprivate"] and "non-private control" in cards["nonprivate"]
    assert "not private" in cards["epsinf"] and "sensitivity 1" in cards["epsinf"]
    assert "not private" not in cards["eps1"] and "noise multiplier" in cards["eps1"]
    assert results["nonprivate"]["noise_multiplier"] == results["epsinf"]["noise_multiplier"] == 0
    assert results["eps1"]["epsilon"] <= 1 and results["epsinf"]["epsilon"] == float("inf")
    assert all("Infinity," not in p.read_text() for p in (tmp_path / "runs").glob("*/result.json"))  # it is quoted


def test_dry_run_touches_nothing(command, tmp_path):
    arguments = ("optimizer=dp_microadam", "epsilon=8", "dry_run=true", "data_dir=nowhere", "steps=1100")
    done = command("train", *arguments, "accountant=rdp", "holdout=0.1", "batch_size=4096")
    assert done.returncode == 0, done.stderr
    assert "cifar10" in done.stdout and "2,753,818" in done.stdout
    assert "For a first look: python run.py experiment=quickstart\n" in done.stdout  # in one line, to be copied
    sigma = float(done.stdout.split("σ = ")[1].split(",")[0])
    assert sigma == pytest.approx(2.08, abs=0.02)
    assert list(tmp_path.iterdir()) == []


def test_the_plan_says_whether_a_hold_out_is_measured(command):
    def told(*words):
        shown = command("estimate", *SHORT, *words).stdout
        return " ".join(shown.replace("│", " ").split())

    assert "hold-out" not in told()
    assert "0.2 of the examples, not measured: with diagnostics=true they are measured, outside ε" in told(
        "holdout=0.2"
    )
    assert "0.2 of the examples, measured, outside ε" in told("holdout=0.2", "diagnostics=true")
    assert told("holdout=0.2", "privacy=none").count("outside ε") == 0


def test_a_finished_run_is_not_repeated(command, tmp_path):
    assert command("train", *SHORT).returncode == 0
    run = only_run(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in run.iterdir() if p.name != ".lock"}
    again = command("train", *SHORT, "device=cpu", "micro_batch=9")
    assert again.returncode == 0 and "finished:" in again.stdout and "step" not in again.stdout
    assert {p: p.stat().st_mtime_ns for p in before} == before
    weights = (run / "model.safetensors").read_bytes()
    assert command("train", *SHORT, "fresh=true").returncode == 0
    assert (run / "result.json").stat().st_mtime_ns > before[run / "result.json"]
    assert (run / "model.safetensors").read_bytes() == weights  # the same seed: the same run


def test_a_failing_job_stops_no_other(command, tmp_path):
    done = command("train", "-m", *SHORT, "optimizer.lr=abc,0.01", "seed=0,1")
    assert done.returncode != 0 and "optimizer.lr=abc" in done.stderr and "Traceback" not in done.stderr
    assert len(list((tmp_path / "runs").glob("*/result.json"))) == 2


def test_ablation_makes_distinct_runs(command, tmp_path):
    done = command("train", "-m", *SHORT, "steps=1", "optimizer.density=.001,.01,.05", "optimizer.window=5,10")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs").glob("*/result.json"))) == 6


@pytest.fixture
def killed(tmp_path):
    """Start a run, kill -9 it once its metrics have grown to a random length; returns its directory."""

    def kill(*arguments: str) -> Path:
        command = [sys.executable, str(ROOT / "run.py"), *arguments, f"output_dir={tmp_path}/runs"]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wanted = random.randint(4, 12)
        for _ in range(6000):
            files = list((tmp_path / "runs").glob("*/metrics.csv"))
            if files and (files[0].parent / "checkpoint.pt").exists() and files[0].read_text().count("\n") > wanted:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not list((tmp_path / "runs").glob("*/result.json")), "the run was over before it could be killed"
        return files[0].parent

    return kill


@pytest.mark.parametrize(
    "options",
    [
        *((), ("randomness=secret",), ("optimizer=dp_sgd", "schedule=cosine")),
        ("optimizer=dp_adam_ac", "filter=kalman"),
        ("optimizer=dp_adambc", "mechanism=bandmf", "mechanism.bands=3"),
    ],
    ids=str,
)
def test_kill_and_resume_is_bit_exact(command, killed, tmp_path, options):
    arguments = (*SHORT, "steps=32", "eval_every=1", "checkpoint_every=4", *options)
    run = killed(*arguments)
    if options == ("randomness=secret",):  # the reference must replay the same secret key
        assert (run / "secret.key").stat().st_mode & 0o777 == 0o600
        (tmp_path / "other" / run.name).mkdir(parents=True)
        shutil.copy(run / "secret.key", tmp_path / "other" / run.name / "secret.key")
    resumed = command("train", *arguments)
    assert resumed.returncode == 0, resumed.stderr
    reference = command("train", *arguments, f"output_dir={tmp_path}/other")
    assert reference.returncode == 0, reference.stderr
    other = tmp_path / "other" / run.name
    assert (run / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert rows(run) == rows(other) and len(rows(run)) == 32
    assert not (run / "secret.key").exists()
    first = int(next(line for line in resumed.stdout.splitlines() if line.startswith("step ")).split()[1].split("/")[0])
    assert first > 4 and (first - 1) % 4 == 0  # it went on from a checkpoint


def test_a_warm_up_arrives(tmp_path):
    warm_up = ("schedule=linear", "schedule.start_factor=0.01", "schedule.end_factor=1", "schedule.total_iters=3")
    dpopt.training.run.run(
        configure(*SHORT, "optimizer=dp_sgd", "optimizer.lr=1", *warm_up, f"output_dir={tmp_path}/runs", "eval_every=1")
    )
    rates = [float(row["optimizer/lr"]) for row in rows(only_run(tmp_path))]
    assert rates[:4] == pytest.approx([0.01, 0.34, 0.67, 1.0])


def test_resume_with_another_micro_batch(command, tmp_path):
    arguments = (*SHORT, "precision=fp64", "optimizer=dp_adam", "steps=8")
    stopped = command("train", *arguments, "time_limit=0", "micro_batch=16")
    assert stopped.returncode == 0 and "the same command continues" in stopped.stdout, stopped.stderr
    run = only_run(tmp_path)
    first = json.loads((run / "result.json").read_text())
    assert first["status"] == "time_limit" and 0 < first["steps"] < 8 and 0 < first["epsilon"] < 1
    assert f"accuracy {first['test_accuracy']:.4%}" in command("evaluate", str(run)).stdout
    card = (run / "privacy_card.md").read_text()
    assert f"(ε = {first['epsilon']:.4g}, δ = 0.0001)" in card and f"after {first['steps']} of 8 planned steps" in card
    assert command("train", *arguments, "micro_batch=64").returncode == 0
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "finished" and result["wall_seconds"] > first["wall_seconds"]
    assert command("train", *arguments, "micro_batch=256", f"output_dir={tmp_path}/other").returncode == 0
    models = [dpopt.load(p / run.name) for p in (tmp_path / "runs", tmp_path / "other")]
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_interrupt_writes_a_result_and_continues(command, tmp_path):
    arguments = [*SHORT, "steps=2000", "checkpoint_every=1000", f"output_dir={tmp_path}/runs"]
    process = subprocess.Popen([sys.executable, str(ROOT / "run.py"), *arguments], cwd=tmp_path, stdout=subprocess.PIPE)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(b"step 4/"):
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    result = json.loads((only_run(tmp_path) / "result.json").read_text())
    assert (only_run(tmp_path) / "model.safetensors").exists()
    assert result["status"] == "interrupted" and 4 <= result["steps"] < 2000 and result["epsilon"] < 1
    more = command("train", *arguments, "time_limit=0")
    assert json.loads((only_run(tmp_path) / "result.json").read_text())["steps"] == result["steps"] + 1, more.stderr


def test_two_at_once(command, tmp_path):
    arguments = [*SHORT, "steps=2000", f"output_dir={tmp_path}/runs"]
    process = subprocess.Popen([sys.executable, str(ROOT / "run.py"), *arguments], cwd=tmp_path, stdout=subprocess.PIPE)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(b"step 2/"):
            break
    second = command("train", *arguments)
    process.kill()
    process.communicate()
    assert second.returncode == 1 and "another process is training" in second.stderr
    assert "Traceback" not in second.stderr


def test_damaged_and_foreign_checkpoints_are_refused(command, tmp_path):
    assert command("train", *SHORT, "time_limit=0").returncode == 0
    run = only_run(tmp_path)
    path = run / "checkpoint.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    damaged = command("train", *SHORT)
    assert damaged.returncode != 0 and "checkpoint.pt is damaged" in damaged.stderr and "fresh=true" in damaged.stderr
    assert path.read_bytes() == whole[: len(whole) // 2] and "Traceback" not in damaged.stderr
    path.write_bytes(whole)
    state = torch.load(path, weights_only=True)
    state["facts"]["dataset"] = "another"
    torch.save(state, path)
    foreign = command("train", *SHORT)
    assert foreign.returncode != 0 and "another dataset" in foreign.stderr and "Traceback" not in foreign.stderr
    assert command("train", *SHORT, "fresh=true").returncode == 0


@pytest.mark.cifar10
def test_wrn_on_cifar10(cifar_dir):
    """Four private steps on real images, two views each; the whole test set would take longer than they do."""
    train, _ = dpopt.data.cifar10().load(cifar_dir, torch.device("cpu"), 0)
    plan = dpopt.PrivacyPlan.calibrate(epsilon=8, delta=1e-5, dataset_size=50_000, batch_size=32, steps=4, seed=0)
    model = dpopt.models.wrn_16_4()
    private = dpopt.PrivateGradient(model, F.cross_entropy, plan, dpopt.clipping.Flat(1.0))
    optimizer = dpopt.optim.MicroAdam(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    for batch in dpopt.poisson_batches(train, plan, views=2, micro_batch=16):
        private.backward(batch)
        optimizer.step()
    assert private.step == 4 and plan.epsilon <= 8
    assert all(p.isfinite().all() and not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
