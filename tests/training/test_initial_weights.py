"""Weights of an earlier run, `model.weights=RUN`, and the public images that such a run may be trained on."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import dpopt
from dpopt import data
from dpopt.data.pretraining import same_records
from dpopt.training import initial_weights

PUBLIC = (
    *("dataset=procedural", "dataset.train_size=600", "dataset.test_size=100", "dataset.channels=1"),
    *("dataset.image_size=8", "model=cnn", "model.widths=[8]", "privacy=none", "optimizer=dp_adam", "logger=csv"),
    *("batch_size=64", "steps=3", "eval_every=3"),
)
SMALL = ("experiment=quickstart", "model.widths=[8]", "batch_size=64", "steps=2", "eval_every=2", "micro_batch=auto")


@pytest.fixture
def public(command, tmp_path):
    done = command("train", *PUBLIC)
    assert done.returncode == 0, done.stderr
    return next(tmp_path.glob("runs/procedural-*"))


def trained(command, tmp_path, *words):
    done = command("train", *SMALL, *words)
    return done, sorted(tmp_path.glob("runs/digits-*/result.json"))


def test_public_weights_then_a_private_run(command, tmp_path, public):
    """Two commands; the card names the chain, the head is new and the message says so, the rest are the weights."""
    done, results = trained(
        command, tmp_path, f"model.weights={public}", "optimizer=dp_sgd", "optimizer.lr=0", "ema=null"
    )
    assert done.returncode == 0, done.stderr
    assert f"weights of run {public.name}, trained on procedural; the head 6 is new" in done.stderr
    run = results[0].parent
    card = (run / "privacy_card.md").read_text()
    assert f"run {public.name}, trained without privacy on procedural, which ε here does not cover" in card
    assert "; before that drawn at random by the seed; head drawn at random by the seed" in card
    before, after = (load_file(path / "model.safetensors") for path in (public, run))
    for name in after:
        assert torch.equal(before[name], after[name]) is not name.startswith("6.")  # lr=0: what it began with
    shutil.rmtree(public)
    assert dpopt.load(run) is not None  # needs no earlier run


def test_the_same_dataset_is_refused_by_name(command, tmp_path):
    _, results = trained(command, tmp_path)
    first = results[0].parent
    done, _ = trained(command, tmp_path, f"model.weights={first}", "seed=1")
    assert done.returncode == 1
    assert re.search(f"come from run {first.name}, trained on digits, as digits here, so ε would not", done.stderr)
    done, _ = trained(command, tmp_path, f"model.weights={first}", "privacy=none", "seed=1")
    assert done.returncode == 0, done.stderr  # claims nothing; but whatever starts from it is refused, too
    second = next(p.parent for p in tmp_path.glob("runs/digits-*nonprivate*/result.json"))
    done, _ = trained(command, tmp_path, f"model.weights={second}", "seed=2")
    assert done.returncode == 1 and f"come from run {second.name}" in done.stderr


def test_the_same_dataset_is_refused_down_the_chain(command, tmp_path, public):
    """digits → procedural → digits: the last run's weights know digits."""
    _, results = trained(command, tmp_path, "privacy=none")
    first = results[0].parent
    done = command("train", *PUBLIC, f"model.weights={first}")
    assert done.returncode == 0, done.stderr
    middle = next(p for p in tmp_path.glob("runs/procedural-*") if p != public)
    done, _ = trained(command, tmp_path, f"model.weights={middle}", "seed=1")
    assert done.returncode == 1 and f"come from run {first.name}" in done.stderr
    shutil.rmtree(first)
    done, _ = trained(command, tmp_path, f"model.weights={middle}", "seed=1")
    assert done.returncode == 1 and "which are gone" in done.stderr


def test_the_same_dataset_is_refused_by_fingerprint(command, tmp_path, monkeypatch):
    """Under another name the data are still the same."""
    _, results = trained(command, tmp_path)
    monkeypatch.setattr(initial_weights, "same_records", lambda *_: False)
    done, _ = trained(command, tmp_path, f"model.weights={results[0].parent}", "seed=1")
    assert done.returncode == 1 and "the very dataset of this run, by its fingerprint" in done.stderr
    result = json.loads(results[0].read_text())
    others = {"data_mac": "0" * 64, "records_mac": "0" * 64}  # other data, under the same key
    results[0].write_text(json.dumps(result | others))
    done, _ = trained(command, tmp_path, f"model.weights={results[0].parent}", "seed=1")
    assert done.returncode == 0, done.stderr


def test_weights_that_do_not_fit_are_refused(command, tmp_path, public):
    done, _ = trained(command, tmp_path, f"model.weights={public}", "model.widths=[16]")
    assert done.returncode == 1 and re.search(r"do not fit this model \(0\.bias\)", done.stderr)
    done, _ = trained(command, tmp_path, f"model.weights={tmp_path}/nothing")
    assert done.returncode == 1 and "is no directory of a run with weights, because result.json is" in done.stderr


def test_the_weights_are_part_of_a_runs_key(public, tmp_path):
    """Two earlier runs at one path give two noises."""
    from helpers import configure

    from dpopt.training.build import build_components

    config = configure(*SMALL, f"++model.weights={public}")
    one = build_components(config).initial_weights()
    tensors = load_file(public / "model.safetensors")
    from safetensors.torch import save_file

    save_file({name: tensor + 1 for name, tensor in tensors.items()}, public / "model.safetensors")
    assert one and one != build_components(config).initial_weights()


@pytest.mark.parametrize(
    "one, other, same",
    [
        (data.cifar10(), data.cifar10_scattering(), True),
        (data.cifar10_squeezenet(), data.cifar10(), True),
        (data.cifar10(), data.cifar100(), False),
        (data.digits(), data.procedural(), False),
        (data.imagenet(), data.imagenet("imagenette2", train_size=9, classes=2), True),
        (data.imagenet("pets", train_size=9, classes=2), data.imagenet("birds", train_size=9, classes=2), False),
        (replace(data.digits(), collection="Places"), replace(data.cifar10(), collection="places"), True),
    ],
)
def test_which_datasets_hold_the_same_records(one, other, same):
    assert same_records(one, other) is same and same_records(other, one) is same


def test_procedural_images_are_a_function_of_the_seed(tmp_path):
    def images(**options):
        spec = data.procedural(train_size=300, test_size=20, image_size=16, **options)
        train, test = spec.load(tmp_path, torch.device("cpu"), 0)
        assert len(train) == 300 and len(test) == 20 and spec.shape == tuple(train.inputs.shape[1:])
        assert int(train.targets.max()) < spec.classes == 12 and len(train.targets.unique()) == 12
        return train.check(spec.expected, "training").inputs

    assert torch.equal(images(), images()) and not torch.equal(images(), images(seed=1))
    assert images().float().std() > 20 and images(channels=1).shape[1] == 1
    with pytest.raises(ValueError, match="orientations"):
        data.procedural(orientations=1)


def test_procedural_classes_can_be_learned(tmp_path):
    """By logistic regression on the spectrum: above 12 classes' chance of 8%."""
    train, test = data.procedural(train_size=3000, test_size=500, channels=1).load(tmp_path, torch.device("cpu"), 0)
    spectra = [(torch.fft.fft2(x.inputs[:, 0].float()).abs() + 1).log().flatten(1) for x in (train, test)]
    model = torch.nn.Linear(1024, 12)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(spectra[0] - 5), train.targets).backward()
        optimizer.step()
    assert (model(spectra[1] - 5).argmax(1) == test.targets).float().mean() > 0.4
