"""Sweepers that search choose by a hold-out that is measured: a stand-in for Optuna's, which reads what jobs return."""

import json
import pickle
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

from dpopt.privacy.accounting import compose_epsilon
from dpopt.runs.result import HOLDOUT
from dpopt.runs.search import CHOICE, Score, price

pytestmark = pytest.mark.slow

TARGET = "hydra_plugins.StandIn"  # Hydra takes sweepers of this package alone
SHORT = ("experiment=quickstart", "steps=2", "batch_size=64", "eval_every=2", "epsilon=1", "randomness=research")
MEASURED = ("holdout=0.1", "diagnostics=true")


class StandIn(Sweeper):
    """Launches one job after the other, as Optuna's sweeper does, and reads a number from each."""

    seen: list[float] = []

    def __init__(self, direction="minimize", **options):
        self.direction = direction

    def setup(self, *, hydra_context, task_function, config):
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        for number, rate in enumerate(("0.001", "0.01")):
            jobs = [[*arguments, f"optimizer.lr={rate}"]]
            (done,) = self.launcher.launch(jobs, initial_job_idx=number)
            self.seen.append(float(done.return_value))


@pytest.fixture
def search(command, monkeypatch):
    plugins = Plugins.instance()
    plugins.register(StandIn)
    monkeypatch.setitem(plugins.class_name_to_class, TARGET, StandIn)
    monkeypatch.setattr(StandIn, "seen", [])

    def call(*words, direction="maximize"):
        sweeper = [f"hydra.sweeper._target_={TARGET}", f"+hydra.sweeper.direction={direction}"]
        return command("train", "-m", *SHORT, *words, *sweeper)

    return call


def test_a_search_sees_the_accuracy_on_the_hold_out(search, tmp_path):
    done = search(*MEASURED)
    assert done.returncode == 0, done.stderr
    results = [json.loads(path.read_text()) for path in Path(tmp_path).glob("runs/*/result.json")]
    assert len(results) == 2 and sorted(StandIn.seen) == sorted(result[HOLDOUT] for result in results)
    assert "sweep: accuracy on the hold-out" in done.stdout and "optimizer.lr=0.01 " in done.stdout
    total = compose_epsilon([(r["noise_multiplier"], r["sample_rate"], r["steps"]) for r in results], 1e-4)
    best = [result for result in results if result[HOLDOUT] == max(StandIn.seen)]
    assert 1 < total < 2 and CHOICE in done.stdout
    assert any(
        f"search: 2 trials, together ε = {total:.4g} at δ = 0.0001; the best one alone, {result['run']}, "
        f"ε = {result['epsilon']:.4g}\n" in done.stdout
        for result in best
    )
    assert "trials without a result" not in done.stdout


def test_a_sweep_that_does_not_search_names_no_price(command):
    done = command("train", "-m", *SHORT, *MEASURED, "optimizer.lr=0.001,0.01")
    assert done.returncode == 0 and "sweep: accuracy on the hold-out" in done.stdout and "search:" not in done.stdout


def result_of(run, accuracy, sigma=2.0, data="a", **more):
    common = {"sample_rate": 0.1, "steps": 10, "delta": 1e-4, "fingerprint_key": "k", "data_mac": data}
    epsilon = compose_epsilon([(sigma, 0.1, 10)], 1e-4)
    return {"run": run, HOLDOUT: accuracy, "noise_multiplier": sigma, "epsilon": epsilon, **common, **more}


def test_the_price_of_a_search_composes_trials_on_one_dataset():
    """A run that two trials share counts once, and another dataset for itself."""
    one, two = result_of("one", 0.5), result_of("two", 0.9, 3.0)
    text = price([one, two, one, result_of("other", 0.7, data="b")], 1)
    total = compose_epsilon([(2.0, 0.1, 10), (3.0, 0.1, 10)], 1e-4)
    first, second, failed, *_ = text.splitlines()
    assert (
        first.startswith(f"search: 2 trials, together ε = {total:.4g} at") and f"two, ε = {two['epsilon']:.4g}" in first
    )
    assert total > one["epsilon"] > two["epsilon"] and second.startswith("search: 1 trials") and "1 trials" in failed
    assert "ε = ∞ at" in price([one, result_of("bare", 0.9, 0.0)], 0)
    assert "unknown (delta=1e-12 is too small" in price([one | {"delta": 1e-12}, two | {"delta": 1e-12}], 0)


@pytest.mark.parametrize(
    "words, direction, message",
    [
        ((), "maximize", "never by the test set: set holdout=0.1 diagnostics=true"),
        (("holdout=0.1",), "maximize", "never by the test set: set holdout=0.1 diagnostics=true"),
        (MEASURED, "minimize", "set hydra.sweeper.direction=maximize"),
        ((*MEASURED, "dry_run=true"), "maximize", "a dry run has none"),
        ((*MEASURED, "delta=2"), "maximize", "delta=2.0 must be a probability"),
    ],
    ids=str,
)
def test_a_search_that_cannot_choose_is_refused_before_it_trains(search, tmp_path, words, direction, message):
    done = search(*words, direction=direction)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert StandIn.seen == [] and not list(Path(tmp_path).glob("runs/*/result.json"))


def test_a_result_without_a_measured_hold_out_is_no_score():
    with pytest.raises(ValueError, match="fresh=true trains it again"):
        Score.of({"run": "name", "test_accuracy": 0.9})
    score = pickle.loads(pickle.dumps(Score.of({HOLDOUT: 0.25})))
    assert score == 0.25 and score.result == {HOLDOUT: 0.25}


@pytest.mark.parametrize(
    "word, message",
    [("epsilon=interval(1,8)", "list the values, as in"), ("hydra/sweeper=optuna", "pip install hydra-optuna-sweeper")],
)
def test_a_search_without_its_plugin_is_one_sentence(command, word, message):
    try:
        import hydra_plugins.hydra_optuna_sweeper  # noqa: F401
    except ImportError:
        done = command("train", "-m", *SHORT, word)
        assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    else:
        pytest.skip("it is installed")


@pytest.mark.filterwarnings("default")  # those of Optuna's own libraries
def test_optuna_itself_ends_with_the_price_of_the_search(command):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="pip install hydra-optuna-sweeper")
    words = ("hydra/sweeper=optuna", "hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=2")
    done = command("train", "-m", *SHORT, *MEASURED, *words, "optimizer.lr=interval(1e-3,1e-2)")
    assert done.returncode == 0, done.stderr
    assert "search: 2 trials, together ε = " in done.stdout + done.stderr
