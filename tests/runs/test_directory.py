"""Run directories, checkpoints, and what is read back from them."""

import json
import math
import re
import subprocess
from dataclasses import asdict, replace

import pytest
import torch
from helpers import ROOT, configure
from safetensors.torch import load_file

import dpopt
from dpopt import files
from dpopt.config.schema import Config
from dpopt.data.sources import TensorSource
from dpopt.runs import directory as run_files
from dpopt.runs import provenance
from dpopt.runs.identity import locate, run_name
from dpopt.training import checkpoint, trainer
from dpopt.training.run import run

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path) -> Config:
    short = dict(
        randomness="research", steps=3, batch_size=64, eval_every=3, epsilon=1.0, output_dir=str(tmp_path / "runs")
    )
    return replace(configure("experiment=quickstart"), **short)


def test_load_gives_the_exported_average(config, tmp_path):
    run(config)
    directory = locate(config)
    model = dpopt.load(directory)
    content = torch.load(directory / "checkpoint.pt", weights_only=True)["parts"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, content["ema"][f"module.{name}"])
    assert any(not torch.equal(t, content["model"][n]) for n, t in model.state_dict().items())
    assert set(load_file(directory / "model.safetensors")) == set(model.state_dict())  # no key, no optimizer state
    with pytest.raises(ValueError, match=r"holds no model.safetensors"):
        dpopt.load(tmp_path)


def test_a_run_that_was_stopped_exports_its_model_until_it_goes_on(config, monkeypatch):
    """The card of a run with a secret key warns of the file that holds it."""
    config = replace(config, randomness="secret", time_limit=0.0)
    stopped = run(config)
    directory = locate(config)
    weights = load_file(directory / "model.safetensors")
    parts = torch.load(directory / "checkpoint.pt", weights_only=True)["parts"]
    assert all(torch.equal(tensor, parts["ema"][f"module.{name}"]) for name, tensor in weights.items())
    assert (directory / "model.safetensors").stat().st_mode == (directory / "checkpoint.pt").stat().st_mode
    assert dpopt.load(directory) and 0 < stopped["epsilon"] < 1
    card = (directory / "privacy_card.md").read_text()
    assert f"ε = {stopped['epsilon']:.4g}" in card and "never publish that file" in card

    def killed(*arguments):
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", killed)
        with pytest.raises(OSError, match="killed"):
            run(config)
    assert not (directory / "model.safetensors").exists() and not (directory / "result.json").exists()
    run(replace(config, time_limit=None))
    assert "secret.key" not in (directory / "privacy_card.md").read_text() and dpopt.load(directory)


def test_results_survive_a_new_configuration_key(config):
    """A run stored before a key existed is found again, as long as the key keeps its default."""
    run(config)
    old = locate(config)
    result = json.loads((old / "result.json").read_text())
    del result["config"]["accountant"]
    (old / "result.json").write_text(json.dumps(result))
    moved = old.rename(old.with_name("digits-cnn-microadam-eps1-seed0-0123456789"))
    assert locate(config) == moved and run_files.finished(moved)
    assert locate(replace(config, accountant="rdp")).name == run_name(replace(config, accountant="rdp"))
    assert locate(replace(config, seed=1)) != moved


def test_a_run_under_an_older_stem_is_continued_where_it_is(config):
    """The stem is for people; the hash says which run it is."""
    config = replace(config, time_limit=0.0)
    run(config)
    old = locate(config)
    old = old.rename(old.with_name(f"digits-cnn-another_name-eps1-seed0-{old.name.rpartition('-')[2]}"))
    assert locate(config) == old and locate(replace(config, seed=1)) != old
    content = torch.load(old / "checkpoint.pt", weights_only=True)
    content["facts"]["name"] = old.name
    torch.save(content, old / "checkpoint.pt")
    result = run(replace(config, time_limit=None))
    assert result["status"] == "finished" and result["run"] == old.name
    assert [path for path in old.parent.iterdir() if path.is_dir() and path.name[0] != "."] == [old]


def test_the_secret_key(tmp_path):
    key = run_files.secret_key(tmp_path)
    assert key.secure and run_files.secret_key(tmp_path) == key
    assert (tmp_path / "secret.key").stat().st_mode & 0o777 == 0o600
    run_files.erase_key(tmp_path)
    assert not (tmp_path / "secret.key").exists() and run_files.secret_key(tmp_path) != key
    for damaged in (b"short", bytes(32)):
        (tmp_path / "secret.key").write_bytes(damaged)
        with pytest.raises(ValueError, match="fresh=true"):
            run_files.secret_key(tmp_path)
    (tmp_path / "secret.key").unlink()
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is lost.*fresh=true"):  # a run that has begun gets no second key
        run_files.secret_key(tmp_path)


def test_the_secret_key_goes_nowhere(config, monkeypatch):
    config = replace(config, randomness="secret")
    keys = []
    real = run_files.secret_key
    monkeypatch.setattr(run_files, "secret_key", lambda directory: keys.append(real(directory)) or keys[-1])
    run(config)
    material = keys[0].material
    for path in locate(config).iterdir():
        content = path.read_bytes()
        assert material not in content and material.hex().encode() not in content
    assert "operating system" in (locate(config) / "privacy_card.md").read_text()


def test_runs_of_a_sweep_share_no_noise(config, monkeypatch):
    keys = []
    real = trainer.poisson_batches
    monkeypatch.setattr(
        trainer, "poisson_batches", lambda data, plan, *a: keys.append(plan.key) or real(data, plan, *a)
    )
    for changed in (config, replace(config, clip_norm=2.0), replace(config, tag="x"), replace(config, seed=1)):
        run(changed)
    fingerprint = TensorSource.fingerprint  # another data set under the same configuration
    monkeypatch.setattr(TensorSource, "fingerprint", lambda self, *_, **options: fingerprint(self) + "'")
    run(replace(config, fresh=True))
    secret = replace(config, randomness="secret")
    monkeypatch.setattr(run_files, "erase_key", lambda directory: None)  # the same secret, and two data sets
    run(secret)
    monkeypatch.setattr(TensorSource, "fingerprint", fingerprint)
    for name in ("result.json", "checkpoint.pt"):
        (locate(secret) / name).unlink()
    run(secret)
    assert len(keys) == 7 and len({key.material for key in keys}) == 7


def test_a_run_in_progress_claims_no_less_than_its_plan(config):
    """A card of a stopped run would state too little as soon as the run goes on."""
    run(replace(config, time_limit=0.0))
    directory = locate(config)
    assert "after 1 of 3" in (directory / "privacy_card.md").read_text() and (directory / "result.json").exists()
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            trainer, "poisson_batches", lambda *a: seen.append((directory / "privacy_card.md").read_text()) or 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            run(config)
    assert "after 3 of 3" in seen[0] and not (directory / "result.json").exists()


def test_diagnostics_once_recorded_stay_on_the_card(config):
    run(replace(config, time_limit=0.0, diagnostics=True, eval_every=1))
    run(replace(config, eval_every=1))
    directory = locate(replace(config, eval_every=1))
    assert "private/train_loss" in (directory / "metrics.csv").read_text()
    assert "all that is named `private/…`" in (directory / "privacy_card.md").read_text()


def test_one_process_at_a_time(tmp_path):
    with (
        run_files.lock(tmp_path),
        pytest.raises(ValueError, match="another process is training"),
        run_files.lock(tmp_path),
    ):
        pass
    with run_files.lock(tmp_path):
        pass


def refuse_constant(name):
    raise ValueError(f"{name} is no JSON")


def test_json_is_valid_also_where_numbers_are_not_finite(tmp_path):
    path, inf = tmp_path / "a.json", float("inf")
    values = {"epsilon": inf, "config": {"epsilon": [1.0, inf, -inf]}, "steps": 3}
    files.write_json(path, values | {"test_loss": float("nan")})
    text = path.read_text()
    assert json.loads(text, parse_constant=refuse_constant)["epsilon"] == "Infinity"
    read = files.read_json(path)
    assert math.isnan(read.pop("test_loss")) and read == values
    path.write_text('{"epsilon": Infinity, "config": {"epsilon": -Infinity}}')  # of an earlier version
    assert files.read_json(path) == {"epsilon": inf, "config": {"epsilon": -inf}}


def test_no_file_but_files_writes_json():
    writing = [path for path in (ROOT / "dpopt").rglob("*.py") if re.search(r"json\.dumps?\(", path.read_text())]
    assert {path.name for path in writing} == {"files.py", "identity.py"}  # identity hashes strings and booleans


def test_atomic_files(tmp_path):
    (tmp_path / "a.json").write_text("{")
    assert files.read_json(tmp_path / "a.json") == {} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_failure_is_recorded_without_a_result(config, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("out of something")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(trainer, "evaluate", fail)
        run(config)
    directory = locate(config)
    assert (directory / "error.txt").read_text() == "RuntimeError: out of something\n"
    assert not (directory / "result.json").exists()
    run(config)
    assert not (directory / "error.txt").exists() and run_files.finished(directory)
    (directory / "error.txt").write_text("RankLost: rank 1, which was killed when the result was there\n")
    run(config)
    assert not (directory / "error.txt").exists()


def test_checkpoints(tmp_path):
    parts = {"model": torch.nn.Linear(2, 2)}
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, 5, {"plan": {"steps": 7}}, parts, {"wall_seconds": 1.5})
    other = {"model": torch.nn.Linear(2, 2)}
    assert checkpoint.load(path, {"plan": {"steps": 7}}, other) == (5, {"wall_seconds": 1.5})
    assert torch.equal(parts["model"].weight, other["model"].weight)
    for facts, parts, words in (
        ({"plan": {"steps": 8}}, other, "another plan"),
        ({"plan": {"steps": 7}}, {"model": torch.nn.Linear(3, 2)}, "does not fit"),
        ({"plan": {"steps": 7}}, {"optimizer": torch.nn.Linear(2, 2)}, "does not fit"),
    ):
        with pytest.raises(ValueError, match=words):
            checkpoint.load(path, facts, parts)
    torch.save({"step": 1, "unpickle": print}, path)
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(path, {}, other)


def test_config_files_are_complete(config):
    run(config)
    import yaml

    stored = Config.from_stored(yaml.safe_load((locate(config) / "config.yaml").read_text()))
    assert asdict(stored) == asdict(config)


def test_the_commit_is_that_of_the_code_that_was_loaded(monkeypatch):
    """A checkout that moves on during a sweep does not change what its runs record."""
    before = provenance.git_commit()
    monkeypatch.setattr(provenance.subprocess, "run", lambda *_, **__: pytest.fail("asked again"))
    assert provenance.git_commit() == before
    assert provenance.short_commit("0123456789abcdef-dirty") == "0123456789ab-dirty"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository that looks like dpopt's, in place of it."""
    for name in ("dpopt/rng.py", "conf/config.yaml", "run.py", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    return tmp_path


def test_only_code_and_configuration_mark_a_commit_as_dirty(checkout):
    commit = provenance.git_commit.__wrapped__
    clean = commit()
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (checkout / "README.md").write_text("other")
    (checkout / "notes.txt").write_text("new")
    assert commit() == clean
    for name in ("dpopt/rng.py", "conf/config.yaml", "run.py", "dpopt/new.py"):
        before = (checkout / name).read_text() if (checkout / name).exists() else None
        (checkout / name).write_text("other")
        assert commit() == f"{clean}-dirty", name
        (checkout / name).unlink() if before is None else (checkout / name).write_text(before)
    assert commit() == clean


def test_an_installed_package_has_no_commit_inside_of_another_project(checkout, monkeypatch):
    site = checkout / ".venv/lib/site-packages"
    (site / "dpopt").mkdir(parents=True)
    (site / "dpopt" / "rng.py").write_text("")
    monkeypatch.setattr(provenance, "ROOT", site)
    assert provenance.git_commit.__wrapped__() is None
    for name in ("run.py", "conf"):
        (site / name).write_text("")
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["add", "-f", "."], ["commit", "-qm", "vendored"]):
        subprocess.run([*git, *words], check=True)
    assert provenance.git_commit.__wrapped__() is None


def test_a_key_that_outlived_its_run_is_erased_at_the_next_start(config):
    """A run that is killed after its result was written leaves its key behind."""
    config = replace(config, randomness="secret")
    run(config)
    key = locate(config) / run_files.KEY
    key.write_bytes(bytes(range(32)))
    run(config)
    assert not key.exists()
