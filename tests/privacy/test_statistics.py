"""Channels standardized by statistics that a run releases: values, runs, resumption, refusals, what is said of them."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import configure, make_plan, rekeyed
from made_features import BOUNDS, features

import dpopt
from dpopt import data
from dpopt.data import clients
from dpopt.data.sources import TensorSource
from dpopt.models.layers import set_statistics, standardizing
from dpopt.privacy.accounting import calibrate_noise, calibrate_steps, compose_epsilon, compute_epsilon, recipe
from dpopt.privacy.plan import PrivacyPlan
from dpopt.privacy.statistics import release_statistics
from dpopt.runs.ledger import Spending, spending, total_epsilon
from dpopt.runs.search import price
from dpopt.training import trainer
from dpopt.training.build import build_components
from dpopt.training.run import run

pytestmark = pytest.mark.slow


def make_plan_of(config):
    return build_components(config).plan


@pytest.fixture
def config(tmp_path):
    budget = dict(
        epsilon=2.0, noise_multiplier=None, steps=4, batch_size=16, delta=1e-3, accountant="pld", randomness="research"
    )
    return replace(
        configure("size=smoke", "optimizer=dp_sgd"),
        dataset={"_target_": "made_features.features"},
        **(budget | dict(checkpoint_every=1, output_dir=str(tmp_path))),
    )


def test_without_noise_they_are_exact():
    """Of a run without privacy, and of ε = ∞: mean 0 and deviation 1 in each channel."""
    train, _ = features().load()
    mean, deviation = release_statistics(BOUNDS, train, make_plan(sigma=0.0))
    model = standardizing(torch.nn.Identity(), 3)
    set_statistics(model, mean, deviation)
    for inputs in (train.inputs, train.inputs.flatten(2)):
        x = model(inputs).transpose(0, 1).flatten(1)
        assert x.mean(1).abs().max() < 1e-5 and (x.std(1, correction=0) - 1).abs().max() < 1e-4


def test_with_little_noise_they_are_close():
    train, _ = features().load()
    bounds = replace(BOUNDS, noise_multiplier=0.06, mean_norm=10.0, square_norm=100.0)
    plan = replace(make_plan(), statistics_noise=0.06)
    near, exact = release_statistics(bounds, train, plan), release_statistics(bounds, train, make_plan(sigma=0.0))
    for one, other in zip(near, exact, strict=True):
        assert torch.tensor(one) == pytest.approx(torch.tensor(other), abs=0.4) and one != other


def test_a_variance_below_the_noise_is_raised_to_it():
    """A channel that is constant is not divided by its noise."""
    x = torch.cat([torch.full((64, 1, 2, 2), 0.1), torch.randn(64, 1, 2, 2)], 1)
    bounds = replace(BOUNDS, mean_norm=10.0, square_norm=20.0)
    plan = replace(make_plan(), statistics_noise=4.0)
    noise = 2**0.5 * 4.0 * 20.0 / 64
    for seed in range(20):
        _, deviation = release_statistics(bounds, TensorSource(x, torch.zeros(64)), rekeyed(plan, seed))
        assert min(deviation) >= noise**0.5


def test_a_run_says_what_it_released_and_a_stopped_one_goes_on_with_it(config, monkeypatch, tmp_path):
    whole = run(config)
    assert whole["epsilon"] <= 2 and whole["statistics_noise"] == 4.0
    card = next(tmp_path.glob("*/privacy_card.md")).read_text()
    assert (
        "released once of all training examples before the first step, sensitivity √2, noise multiplier 4; in ε" in card
    )
    assert "first = from_gaussian_mechanism(4.0" in card and "statistics of channels" in card
    released = []

    def release(*arguments):
        released.append(release_statistics(*arguments))
        return released[-1]

    monkeypatch.setattr(trainer, "release_statistics", release)
    stopped = replace(config, output_dir=str(tmp_path / "again"))
    assert run(replace(stopped, time_limit=0.0))["status"] == "time_limit"
    again = run(stopped)
    assert len(released) == 1 and again["test_loss"] == whole["test_loss"]
    model = dpopt.load(next((tmp_path / "again").glob("features-*")))  # it standardizes by itself
    assert torch.equal(model.standardize.mean, torch.tensor(released[0][0]))
    _, test = features().load()
    with torch.no_grad():
        loss = F.cross_entropy(model(test.inputs).double(), test.targets)
    assert float(loss) == pytest.approx(whole["test_loss"], rel=1e-6)


def test_bounds_belong_to_the_key_and_the_checkpoint(config, monkeypatch, tmp_path):
    """Whoever changes them in code gets other noise, and no checkpoint of the former ones."""
    first = run(config)
    monkeypatch.setattr("made_features.BOUNDS", replace(BOUNDS, square_norm=3.0))
    second = run(replace(config, output_dir=str(tmp_path / "other")))
    assert first["run"] == second["run"] and first["test_loss"] != second["test_loss"]
    stopped = replace(config, output_dir=str(tmp_path / "stopped"))
    run(replace(stopped, time_limit=0.0))
    monkeypatch.setattr("made_features.BOUNDS", BOUNDS)
    with pytest.raises(ValueError, match="statistics"):
        run(stopped)


def test_a_secret_key_releases_once():
    train, _ = features().load()
    plan = PrivacyPlan.calibrate(
        noise_multiplier=1.0, steps=5, dataset_size=64, batch_size=16, delta=1e-3, statistics_noise=4.0
    )
    release_statistics(BOUNDS, train, plan)
    with pytest.raises(ValueError, match="using it twice would cancel it: calibrate a new plan"):
        release_statistics(BOUNDS, train.subset(torch.arange(63)), plan)


def test_an_infinite_epsilon_pays_for_nothing(config):
    result = run(replace(config, epsilon=float("inf")))
    assert result["epsilon"] == float("inf") and "statistics_noise" not in result
    assert replace(make_plan(sigma=0.0), statistics_noise=4.0).epsilon_at(0) == float("inf")


@pytest.mark.parametrize("mechanism", ["gaussian", "bandmf", "lambda_cgd"])
def test_a_search_is_priced_as_the_ledger_composes_it(config, mechanism):
    """Two trials, whose results tell what they released; one of an earlier version tells too little."""
    short = replace(config, mechanism=configure(f"mechanism={mechanism}").mechanism, batch_size=4, steps=8)
    results = [run(replace(short, tag=tag)) | {"private/holdout_accuracy": 0.5} for tag in "ab"]
    (plan,) = {make_plan_of(replace(short, tag=tag)) for tag in "ab"}
    together = compose_epsilon(plan.releases(8) * 2, 1e-3)
    assert f"2 trials, together ε = {together:.4g} " in price(results, 0) and together > results[0]["epsilon"]
    if mechanism != "gaussian":
        for result in results:
            del result["releases"]
        assert "together ε = unknown" in price(results, 0) and "of an earlier version" in price(results, 0)


def test_a_target_that_other_accountants_cannot_reach_is_met():
    """Statistics that leave little: Rényi accounting says they cost more than all."""
    noise = calibrate_noise(0.67, 0.05, 20, 1e-5, "pld", 5.657)
    assert 0.67 * (1 - 1e-4) <= compute_epsilon(noise, 0.05, 20, 1e-5, "pld", 5.657) <= 0.67
    assert compute_epsilon(5.657, 1.0, 1, 1e-5, "rdp") > 0.67
    assert calibrate_steps(1.0, 2.0, 0.05, 1e-5) > 1


def test_a_recipe_prints_the_epsilon_of_the_plan(capsys):
    for accountant in ("pld", "rdp", "prv"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Opacus takes the logarithm of 0 where the rate is 1
            exec(recipe(1.5, 16, 64, 5, 1e-3, accountant, 4.0), {})
        expected = compute_epsilon(1.5, 16 / 64, 5, 1e-3, accountant, 4.0)
        assert float(capsys.readouterr().out) == pytest.approx(expected, rel=1e-9)
        assert expected > compute_epsilon(1.5, 16 / 64, 5, 1e-3, accountant)


def test_the_ledger_adds_them(tmp_path):
    plan = replace(make_plan(), statistics_noise=4.0)
    about = {"run": "1", "name": "a", "dataset": "d", "data": "f", "key_id": "k"}
    entry = spending(plan, 20, "finished", **about)
    assert total_epsilon([entry], 1e-3) == pytest.approx(plan.epsilon, rel=1e-3)
    old = {k: v for k, v in vars(entry).items() if k != "statistics_noise"}  # a line of an earlier version
    assert total_epsilon([Spending(**old)], 1e-3) == pytest.approx(make_plan().epsilon, rel=1e-9)


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda: calibrate_noise(0.1, 0.2, 5, 1e-5, "pld", 4.0),
            r"the statistics alone cost epsilon=.* of 0\.1: raise",
        ),
        (
            lambda: PrivacyPlan.calibrate(
                epsilon=0.1, noise_multiplier=2.0, dataset_size=64, batch_size=16, delta=1e-3, statistics_noise=4.0
            ),
            r"the statistics alone cost more than epsilon=0\.1: raise their noise multiplier",
        ),
        (lambda: data.mnist_scattering(None, {"noise": 3}), r"dataset\.statistics=.* must be three numbers"),
        (lambda: replace(BOUNDS, mean_norm=0.0), "statistics.mean_norm=0.0 must be a positive number"),
        (lambda: replace(make_plan(), statistics_noise=1e-3), "statistics_noise=0.001 must be between"),
        (
            lambda: release_statistics(BOUNDS, features().load()[0], make_plan()),
            "the plan accounts for statistics of noise multiplier 0, not 4: calibrate it with statistics_noise=4",
        ),
        (
            lambda: release_statistics(BOUNDS, TensorSource(torch.zeros(4, 3), torch.zeros(4)), make_plan()),
            "taken of floating-point features",
        ),
        (lambda: clients("made_features.features"), "an example is protected, not a client"),
    ],
)
def test_what_cannot_be_released_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_run_that_cannot_be_standardized_leaves_no_directory(config, monkeypatch, tmp_path):
    tables = TensorSource(torch.zeros(64, 48), torch.arange(64) % 10)
    spec = replace(features(), shape=(48,), load=lambda *_: (tables, tables))
    monkeypatch.setattr("made_features.features", lambda: spec)
    linear = replace(config, model={"_target_": "torch.nn.Linear", "in_features": 48, "out_features": 10})
    with pytest.raises(ValueError, match=r"drop dataset\.statistics"):
        run(linear)
    assert not list(tmp_path.iterdir())
