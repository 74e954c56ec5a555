"""The configuration tree: every YAML is a valid call, names are what they should be, presets behave."""

import hashlib
import inspect
import json
import re
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from helpers import CONF, ROOT, configure
from hydra.utils import get_object
from omegaconf import OmegaConf

import dpopt
from dpopt.config.components import build, check_components, component_name
from dpopt.config.overrides import check_overrides
from dpopt.config.schema import COMPONENTS, Config
from dpopt.runs.identity import NOT_IDENTITY, describe, identity, nondefault_components, run_name

GROUPS = sorted(p.relative_to(CONF).with_suffix("") for g in COMPONENTS for p in (CONF / g).glob("*.yaml"))
OPTIMIZERS = sorted((CONF / "optimizer").glob("*.yaml"))
PRESETS = sorted(p.stem for p in (CONF / "experiment").glob("*.yaml"))  # one run each


def test_there_is_something_to_test():
    assert len(GROUPS) >= 20 and len(PRESETS) >= 2


def test_a_target_goes_before_the_submodule_of_its_name(monkeypatch):
    """From Python 3.12 on `pydoc.locate` returns the submodule, here on every version."""
    names = [node["_target_"] for node in (configure(f"model={m}").model for m in ("cnn", "linear"))]
    submodules = [sys.modules[name] for name in names]
    monkeypatch.setattr("pydoc.locate", lambda path, forceload=0: sys.modules[path])
    for name, submodule in zip(names, submodules, strict=True):
        target = build("model", {"_target_": name}).func
        assert target is not submodule and target is getattr(dpopt.models, name.rpartition(".")[2])


def test_a_target_that_cannot_be_imported_is_named_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "broken_target.py").write_text("import no_such_package\n")
    (tmp_path / "raising_target.py").write_text("raise RuntimeError('no luck')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for target, words in {
        "broken_target.Adam": "No module named 'no_such_package'",
        "raising_target.Adam": "no luck",
        "no_such_package.Adam": "there is no such module, class or function",
        "dpopt.optim.Nothing": "there is no such module, class or function",
    }.items():
        with pytest.raises(ValueError, match=re.escape(f"optimizer._target_={target} cannot be imported: {words}")):
            build("optimizer", {"_target_": target})


@pytest.mark.parametrize("path", GROUPS, ids=str)
def test_every_component_mirrors_its_call(path):
    """Every key is an argument and every value fits; the file opens with its command and its source."""
    lines = (CONF / f"{path}.yaml").read_text().removeprefix("# @package _global_\n").splitlines()
    assert lines[0].startswith("# python run.py ") and lines[1].startswith("# ")
    group, name = path.parts
    if group in ("optimizer", "clipping", "filter", "estimator"):  # what docs/methods.md is made of
        assert lines[2].startswith("# rule: ") and lines[3].startswith("# use: ")
    config = configure(f"{group}={name}")
    check_components(config)
    node = getattr(config, group)
    if path == Path("filter/none"):
        assert node == {}
        return
    inspect.signature(get_object(node["_target_"])).bind_partial(**{k: v for k, v in node.items() if k != "_target_"})


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_opens_with_its_command(name):
    lines = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_" and lines[1].startswith(f"# python run.py experiment={name}")
    settings = "\n".join(lines).partition("\nhydra:")[0]
    assert not re.search(r"^epsilon:", settings, re.M)  # a preset chooses a budget with `override /privacy`
    check_components(configure(f"experiment={name}"))


@pytest.mark.parametrize("name", ["", *PRESETS])
def test_budgets_behave_under_every_preset(name):
    preset = [f"experiment={name}"] if name else []
    assert configure(*preset, "privacy=eps3").epsilon == 3
    assert configure(*preset, "epsilon=1").epsilon == 1
    assert not configure(*preset, "privacy=none").private
    with pytest.raises(ValueError, match="privacy=none trains without privacy"):
        configure(*preset, "privacy=none", "epsilon=8")


# A changed value for every field; those in NOT_IDENTITY must not change the name, all others must.
CHANGED = dict(
    dataset=["dataset=cifar100"],
    model=["model=wrn_40_4"],
    optimizer=["optimizer.lr=0.123"],
    clipping=["clipping=automatic"],
    estimator=["estimator=zeroth_order"],
    mechanism=["mechanism=bandmf"],
    filter=["filter=kalman"],
    schedule=["schedule=clip_rate"],
    logger=["logger=tensorboard"],
    private=["privacy=none"],
    epsilon=["epsilon=2"],
    noise_multiplier=["noise_multiplier=2", "steps=null"],
    steps=["steps=77"],
    epochs=["epochs=3", "steps=null"],
    delta=["delta=1e-6"],
    accountant=["accountant=rdp"],
    clip_norm=["clip_norm=2"],
    randomness=["randomness=research"],
    ledger=["ledger=off"],
    allow_large_delta=["allow_large_delta=true"],
    batch_size=["batch_size=100"],
    views=["views=4"],
    holdout=["holdout=0.1"],
    holdout_by=["holdout=0.1", "holdout_by=position"],
    ema=["ema=0.5"],
    precision=["precision=fp64"],
    seed=["seed=1"],
    tag=["tag=x"],
    eval_every=["eval_every=7"],
    checkpoint_every=["checkpoint_every=7"],
    time_limit=["time_limit=100"],
    diagnostics=["diagnostics=true"],
    audit=["audit=true"],
    dry_run=["dry_run=true"],
    fresh=["fresh=true"],
    data_dir=["data_dir=/elsewhere"],
    output_dir=["output_dir=/elsewhere"],
    device=["device=cpu"],
    workers=["workers=7"],
    micro_batch=["micro_batch=7"],
    memory=["memory=2"],
    engine=["engine=vmap"],
    compile=["compile=true"],
)


def test_the_table_of_changes_is_complete():
    assert set(CHANGED) == {f.name for f in fields(Config)} and set(CHANGED) > NOT_IDENTITY


@pytest.mark.parametrize("key", CHANGED)
@pytest.mark.parametrize("preset", PRESETS)
def test_what_makes_a_run(key, preset):
    base, changed = configure(f"experiment={preset}"), configure(f"experiment={preset}", *CHANGED[key])
    assert getattr(base, key) != getattr(changed, key)
    assert (run_name(base) == run_name(changed)) == (key in NOT_IDENTITY)


def test_a_split_by_position_is_what_earlier_versions_did():
    """The key came later: position, their split, leaves the name as it was, and without a hold-out it does nothing."""
    words = ("experiment=quickstart", "holdout=0.1")
    by = {how: run_name(configure(*words, f"holdout_by={how}")) for how in ("content", "position")}
    assert by["content"] != by["position"] == run_name_of_the_first_release(configure(*words))
    assert run_name(configure(words[0], "holdout_by=position")) == run_name(configure(words[0]))


def run_name_of_the_first_release(config: Config) -> str:
    """Without the keys that came later."""
    later = {"holdout_by", "randomness", "allow_large_delta", "ledger", "audit", "canaries", "mechanism"}
    values = {key: value for key, value in asdict(config).items() if key not in later | NOT_IDENTITY}
    values["optimizer"] = {key: value for key, value in values["optimizer"].items() if key != "kernels"}
    text = json.dumps(canonical(values | {"secure_rng": config.randomness == "secret"}), sort_keys=True)
    stem = run_name(config).rpartition("-")[0]
    return f"{stem}-{hashlib.blake2b(text.encode(), digest_size=5).hexdigest()}"


def canonical(value):
    if isinstance(value, dict):
        return {key: canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    return value if isinstance(value, bool | str) or value is None else repr(float(value))


def test_numbers_are_numbers():
    assert run_name(configure("epsilon=8")) == run_name(configure("epsilon=8.0"))
    assert run_name(configure("optimizer.lr=1")) == run_name(configure("optimizer.lr=1.0"))
    assert run_name(configure("optimizer.lr=1")) != run_name(configure("optimizer.lr=1.1"))


def test_names_are_safe_file_names():
    name = run_name(configure("tag='a=b, c/d'", "epsilon=0.5"))
    assert not set(name) & set("=, /") and name.startswith("cifar10-wrn_16_4-microadam-eps0.5-seed0-a_b__c_d-")
    assert "eps" not in run_name(configure("privacy=none")) and "sigma2" in run_name(
        configure("noise_multiplier=2", "epsilon=null")
    )


def test_a_presets_key_goes_as_the_message_says():
    config = configure(
        "experiment=cifar10_eps3", "optimizer=dp_adam", "model=linear", "~optimizer.momentum", "~model.widths"
    )
    check_components(config)
    assert config.optimizer["_target_"] == "torch.optim.Adam"


def test_identity_survives_yaml():
    config = configure("experiment=quickstart")
    again = Config(**OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(asdict(config)))))
    assert identity(again) == identity(config) == identity(asdict(config))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["+no_such_key=1"], "unknown key no_such_key"),
        (["+optimizer.windw=3"], r"optimizer.windw is not an argument of .*window"),
        (["experiment=cifar10_eps3", "optimizer=dp_adam"], r"optimizer.momentum .* add '~optimizer.momentum'"),
        (["experiment=cifar10_eps1", "size=smoke"], r"dataset.augment .* add '~dataset.augment'"),
        (["optimizer.lr=abc"], r"optimizer.lr=abc does not fit .* float"),
        (["optimizer.window=1.5"], "optimizer.window=1.5 does not fit .* int"),
        (["optimizer.betas=[0.9]"], "optimizer.betas"),
        (["optimizer.error_feedback=3"], "optimizer.error_feedback"),
        (["optimizer=dp_sgd", "optimizer.momentum=null"], "optimizer.momentum=None"),
        (["model._target_=dpopt.models.nothing"], "cannot be imported"),
        (["model=deit_tiny", "model.train=some"], "model.train=some"),
        (["views=0"], "views=0"),
        (["precision=fp8"], "precision=fp8"),
        (["holdout=1"], "holdout=1"),
        (["ema=1"], "ema=1"),
        (["clip_norm=0"], "clip_norm=0"),
        (["seed=-1"], "seed=-1"),
        (["privacy=none", "steps=null"], "set steps, or set steps=null and epochs"),
    ],
)
def test_bad_configurations(overrides, message):
    with pytest.raises(ValueError, match=message):
        check_components(configure(*overrides))


def test_keys_that_are_not_there_are_told_before_hydra_sees_them():
    check_overrides(
        [
            "-m",
            "experiment=quickstart",
            "epsilon=8",
            "optimizer.lr=1",
            "hydra/launcher=joblib",
            "~ema",
            "filter=kalman",
        ]
    )
    for word, message in (
        ("lr=1", "optimizer.lr"),
        ("optimzer=dp_sgd", "did you mean optimizer"),
        ("xyzzy=1", "is no key "),
    ):
        with pytest.raises(ValueError, match=message):
            check_overrides(["experiment=quickstart", word])


@pytest.mark.parametrize(
    "word, message",
    [
        ("+experiment=quickstart", "+experiment= is now experiment=: experiment=quickstart"),
        ("+scale=cpu", "+scale= is now size=: size=cpu"),
        ("scale=smoke", "scale= is now size=: size=smoke"),
        ("+size=cpu", "+size= is now size=: size=cpu"),
        ("secure_rng=true", "secure_rng= is now randomness=: randomness=secret (the default) or randomness=research"),
    ],
)
def test_words_of_earlier_versions_name_the_new_ones(word, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_overrides(["-m", "optimizer=dp_sgd", word])


def test_names_say_what_is_not_standard():
    config = configure("experiment=quickstart")
    other = configure("experiment=quickstart", "clipping=adaptive", "filter=kalman", "schedule=cosine")
    assert run_name(config).startswith("digits-cnn-microadam-eps8-seed0-")
    assert run_name(other).startswith("digits-cnn-microadam-adaptive-kalman-cosineannealinglr-eps8-")
    assert nondefault_components(configure("experiment=quickstart", "privacy=none", "clipping=adaptive")) == []
    assert nondefault_components(configure("experiment=quickstart", "estimator=zeroth_order")) == ["zerothorder"]


def test_a_new_torch_optimizer_is_one_yaml(tmp_path):
    config = configure("experiment=quickstart")
    check_components(replace(config, optimizer={"_target_": "torch.optim.RMSprop", "lr": 0.01, "alpha": 0.9}))


def test_help_imports_no_torch():
    code = (
        "import sys, runpy; sys.argv = ['run.py', '--cfg', 'job']\n"
        "try: runpy.run_path('run.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "epsilon: 8.0" in done.stdout


def test_no_file_is_forgotten():
    folders = {p.name for p in Path(CONF).iterdir() if p.is_dir()}
    assert folders == {*COMPONENTS, "privacy", "experiment", "size", "tuned", "hydra"}


def test_values_by_epsilon():
    from dpopt.config.overrides import by_epsilon

    rates = {1: 2, 8: 4}
    assert [by_epsilon(e, rates) for e in (0.1, 1, 2.8, 2.9, 8, 50, None, float("inf"))] == [2, 2, 2, 4, 4, 4, 4, 4]
    controls = rates | {float("inf"): 6, "none": 1}
    assert [by_epsilon(e, controls, p) for e, p in ((1, True), (50, True), (float("inf"), True))] == [2, 4, 6]
    assert [by_epsilon(None, controls, p) for p in (True, False)] == [4, 1] and by_epsilon(None, rates, False) == 4
    words = ("model=wrn_16_4", "optimizer=dp_sgd")
    assert [configure(*words, f"epsilon={e}").optimizer["lr"] for e in (1, 8)] == [2, 4]
    assert configure(*words, "privacy=none").optimizer["lr"] == 4
    assert configure(*words, "optimizer.lr=7").optimizer["lr"] == 7
    assert configure("model=resnet18", "optimizer=dp_sgd").optimizer["lr"] == 1
    assert configure("privacy=noiseless").epsilon == float("inf")


def test_every_optimizer_has_a_name_of_its_own_and_an_image_folder_its_own():
    configs = {path.stem: configure(f"optimizer={path.stem}") for path in OPTIMIZERS}
    stems = {name: run_name(config).rpartition("-")[0] for name, config in configs.items()}
    assert len(set(stems.values())) == len(stems), stems
    names = {name: component_name(config.optimizer) for name, config in configs.items()}
    assert (names["dp_adamw_bc"], names["dp_adambc"]) == ("adamwbc", "adambc")
    folder = ["dataset=imagenet", "dataset.folder=/data/Company/", "dataset.train_size=2000", "dataset.classes=7"]
    config = configure(*folder, "delta=1e-5")
    assert run_name(config).startswith("company-") and describe(config).dataset == "company"
    assert run_name(configure("dataset=imagenet", "delta=1e-7")).startswith("imagenet-")
