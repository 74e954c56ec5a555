"""What cannot be trained is refused in one sentence, before a run has a directory."""

import pytest
import torch
from helpers import configure

import dpopt.training.run

pytestmark = pytest.mark.slow

SHORT = ("experiment=quickstart", "steps=6", "batch_size=64", "eval_every=2", "epsilon=1", "randomness=research")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["epsilon=-1"], "epsilon=-1.0 must be a positive number"),
        (["optimizer=nothing"], "Could not find 'optimizer/nothing'"),
        (["no_such_key=1"], "no_such_key"),
        (["+no_such_key=1"], "unknown key no_such_key"),
        (["model._target_=torchvision.models.resnet18", "~model.widths"], "GroupNorm"),
        (["dataset=cifar10", "delta=1e-5", "data_dir=nowhere"], "set data_dir"),
        (["epsilon=abc"], "'abc' of type 'str' could not be converted to Float"),
        (["epsilon=[1"], "'[1'"),
        (["epsilon=1,2"], "add --multirun"),
        (["optimizer.lrr=3"], "optimizer.lrr is no option: did you mean optimizer.lr? (+optimizer.lrr=VALUE adds one"),
        (["model.nope=3"], "model.nope is no option: model has widths (+model.nope=VALUE adds one"),
        (["dataset.nope.more=3"], "dataset.nope"),
        (["hydra/launcher=nothing"], "basic, joblib, slurm, submitit_local"),
        (["-cd", "nowhere"], "nowhere' not found"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(command, tmp_path, arguments, words):
    done = command("train", *SHORT, *arguments)
    assert done.returncode == 1
    assert words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr and "HYDRA_FULL_ERROR" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_stack_is_shown_where_it_is_asked_for_and_that_of_a_bug_always(command, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr("dpopt.training.run.run", lambda config: 1 / 0)
        bug = command("train", *SHORT)
        assert bug.returncode == 1 and "ZeroDivisionError" in bug.stderr and "Traceback" in bug.stderr
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match=r"epsilon=-1.0 must be"):
        command("train", *SHORT, "epsilon=-1")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["epsilon=nan"], "epsilon=nan must be"),
        (["epsilon=null"], "set epsilon"),
        (["delta=2"], "delta=2.0 must be"),
        (["batch_size=2000"], "lower batch_size"),
        (["privacy=none", "epsilon=8"], "choose a budget with privacy=eps8"),
        (["noise_multiplier=3"], "set one to null"),
        (["epsilon=0.0001", "steps=100000"], "choose a larger epsilon"),
        (["+optimizer.windw=3"], "optimizer.windw is not an argument"),
        (["optimizer.lr=abc"], "optimizer.lr=abc does not fit"),
        (["optimizer.bits=5"], "bits=5 must be 2, 4, 8 or 32"),
        (["dataset=imagenet", "delta=1e-7", "data_dir=nowhere", "batch_size=64"], "set data_dir"),
        (["dataset=cifar10"], "allow_large_delta=true"),
        (["device=cuda"], "use device=cpu"),
        (["device=mps"], "use device=cpu"),
        (["model.widths=[8,8,8,8]"], "does not accept digits's inputs"),
        (["time_limit=-1"], "time_limit=-1.0 must be"),
        (["schedule=clip_rate"], "choose clipping=slack or adaptive"),
        (["clipping=slack", "estimator=zeroth_order"], "has no layers, slack"),
        (["schedule=clip_rate", "clipping=adaptive", "clipping.quantile=0.5"], "set schedule.target=0.5"),
        (["clipping=adaptive", "clipping.count_noise=0.1"], "count_noise=0.1 must be above half"),
        (["filter=kalman", "optimizer=dp_adambc"], "choose another optimizer"),
        (["estimator=zeroth_order", "clipping=per_layer"], "one number per example"),
        (["optimizer=dp_adam_stp", "compile=true"], "compile=true does not go with"),
        (["experiment=federated", "compile=true"], "compile=true does not go with"),
        (["experiment=least_squares", "compile=true"], "compile=true does not go with"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_a_directory_is_made(tmp_path, arguments, words):
    """The same refusals without a process each; `run.py` turns ValueError and OSError into a sentence."""
    if arguments == ["device=cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises((ValueError, OSError)) as caught:
        dpopt.training.run.run(configure(*SHORT, f"output_dir={tmp_path}/runs", *arguments))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_an_exit_code_and_a_sentence_from_a_process(cli, tmp_path):
    done = cli(*SHORT, "epsilon=-1")
    assert done.returncode == 1 and "epsilon=-1.0 must be" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_output_below_a_file(command, tmp_path):
    (tmp_path / "file").write_text("")
    done = command("train", *SHORT, f"output_dir={tmp_path}/file/runs")
    assert done.returncode != 0 and "is a file: choose another" in done.stderr and "Traceback" not in done.stderr
