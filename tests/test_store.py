"""Run directories, checkpoints, and what is read back from them."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file
from test_config import configure

import dpopt
from dpopt import checkpoint, store, train
from dpopt.config import Config, run_name
from dpopt.privacy.streams import RandomKey


@pytest.fixture
def config(tmp_path) -> Config:
    short = dict(steps=3, batch_size=64, eval_every=3, output_dir=str(tmp_path / "runs"))
    return replace(configure("+experiment=quickstart"), **short)


def test_load_gives_the_exported_average(config, tmp_path):
    train.run(config)
    directory = store.locate(config)
    model = dpopt.load(directory)
    content = torch.load(directory / "checkpoint.pt", weights_only=True)["parts"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, content["ema"][f"module.{name}"])
    assert any(not torch.equal(t, content["model"][n]) for n, t in model.state_dict().items())
    assert set(load_file(directory / "model.safetensors")) == set(model.state_dict())  # no key, no optimizer state
    with pytest.raises(ValueError, match=r"holds no model.safetensors"):
        dpopt.load(tmp_path)


def test_results_survive_a_new_configuration_key(config):
    """A run stored before a key existed is found again, as long as the key keeps its default."""
    train.run(config)
    old = store.locate(config)
    result = json.loads((old / "result.json").read_text())
    del result["config"]["accountant"]
    (old / "result.json").write_text(json.dumps(result))
    moved = old.rename(old.with_name("digits-cnn-microadam-eps8-seed0-0123456789"))
    assert store.locate(config) == moved and store.finished(moved)
    assert store.locate(replace(config, accountant="rdp")).name == run_name(replace(config, accountant="rdp"))
    assert store.locate(replace(config, seed=1)) != moved


def test_the_secret_key(tmp_path):
    key = store.secret_key(tmp_path)
    assert key.secure and store.secret_key(tmp_path) == key
    assert (tmp_path / "secret.key").stat().st_mode & 0o777 == 0o600
    store.erase_key(tmp_path)
    assert not (tmp_path / "secret.key").exists() and store.secret_key(tmp_path) != key
    (tmp_path / "secret.key").write_bytes(b"short")
    with pytest.raises(ValueError, match="fresh=true"):
        store.secret_key(tmp_path)


def test_the_secret_key_goes_nowhere(config, monkeypatch):
    config = replace(config, secure_rng=True)
    keys = []
    real = store.secret_key
    monkeypatch.setattr(store, "secret_key", lambda directory: keys.append(real(directory)) or keys[-1])
    train.run(config)
    material = keys[0].material
    for path in store.locate(config).iterdir():
        content = path.read_bytes()
        assert material not in content and material.hex().encode() not in content
    assert "operating system" in (store.locate(config) / "privacy_card.md").read_text()


def test_runs_of_a_sweep_share_no_noise(config, monkeypatch):
    keys = []
    real = RandomKey.from_seed
    monkeypatch.setattr(
        RandomKey,
        "from_seed",
        classmethod(lambda cls, *a: keys.append(real(*a)) or keys[-1] if len(a) > 2 else real(*a)),
    )
    for changed in (config, replace(config, clip_norm=2.0), replace(config, tag="x"), replace(config, seed=1)):
        train.run(changed)
    assert len(keys) == 4 and len({key.material for key in keys}) == 4


def test_one_process_at_a_time(tmp_path):
    with store.claim(tmp_path), pytest.raises(ValueError, match="another process is training"), store.claim(tmp_path):
        pass
    with store.claim(tmp_path):
        pass


def test_atomic_files(tmp_path):
    store.write_json(tmp_path / "a.json", {"epsilon": float("inf")})
    assert store.read_json(tmp_path / "a.json") == {"epsilon": float("inf")}
    (tmp_path / "a.json").write_text("{")
    assert store.read_json(tmp_path / "a.json") == {} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_failure_is_recorded_without_a_result(config, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("out of something")

    monkeypatch.setattr(train, "evaluate", fail)
    with pytest.raises(RuntimeError):
        train.run(config)
    directory = store.locate(config)
    assert (directory / "error.txt").read_text() == "RuntimeError: out of something\n"
    assert not (directory / "result.json").exists()
    monkeypatch.undo()
    train.run(config)
    assert not (directory / "error.txt").exists() and store.finished(directory)


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
    train.run(config)
    import yaml

    stored = Config(**yaml.safe_load((store.locate(config) / "config.yaml").read_text()))
    assert asdict(stored) == asdict(config)
