"""The `dpopt` command: its verbs, help, TAB completion, and configuration folders of one's own."""

import os
import resource
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT
from omegaconf import OmegaConf

import dpopt
from dpopt.cli import VERBS, main, overview

pytestmark = pytest.mark.slow

CALL = "import sys; sys.argv[0] = 'dpopt'; from dpopt.cli import main; code = main()"


def test_the_list_of_verbs(capsys):
    for words in ([], ["--help"], ["-h"]):
        assert main(words) == 0
        assert capsys.readouterr().out == overview() + "\n"
    assert all(f"\n  {verb} " in overview() for verb in ("train", "estimate", "evaluate", "rerun", "table"))
    assert len(overview().splitlines()) < 20
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"dpopt {dpopt.__version__}\n"


def test_public_names_are_listed_before_torch_is_there():
    code = "import sys, dpopt; assert set(dpopt.__all__) < set(dir(dpopt)) and 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0


@pytest.mark.parametrize(
    "words, meant",
    [
        (["trian", "epsilon=8"], "trian is not a verb of dpopt: did you mean train? "),
        (["re-run"], "did you mean rerun? "),
        (["xyzzy"], "did you mean "),
        (["experiment=quickstart"], "did you mean `dpopt train experiment=quickstart`?"),
        (["-m", "seed=0,1"], "did you mean `dpopt train -m seed=0,1`?"),
    ],
    ids=str,
)
def test_an_unknown_verb_is_one_sentence(words, meant, capsys):
    assert main(words) == 2
    seen = capsys.readouterr()
    assert meant in seen.err and seen.err.count("\n") == 1 and seen.out == ""


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "table"])
def test_every_verb_has_help(command, verb):
    done = command(verb, "--help")
    assert done.returncode == 0 and len(done.stdout) > 200 and done.stderr == ""


def test_help_names_the_command_that_was_called(command, monkeypatch):
    assert "python run.py experiment=quickstart" in command("train", "--help").stdout
    monkeypatch.setattr("dpopt.config.overrides.sys.argv", ["/usr/bin/dpopt"])
    assert dpopt.config.overrides.program() == "dpopt train"


@pytest.mark.parametrize(
    "words, line, expected",
    [
        ("--help", "", "dpopt evaluate runs/NAME"),
        ("train --help", "", "dpopt train experiment=quickstart"),
        ("train --cfg job", "", "epsilon: 8.0"),
        ("-sc query=bash", "dpopt train experiment=quickstart optimizer.wi", "optimizer.window="),
    ],
)
def test_help_and_completion_are_quick_and_import_no_torch(words, line, expected, tmp_path):
    """In seconds of processor time, which a busy machine leaves alone."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = f"{CALL}\nassert 'torch' not in sys.modules, 'torch was imported'"
    code = code.replace("code = main()", "\ntry: code = main()\nexcept SystemExit as error: assert not error.code")
    environment = {**os.environ, "COMP_LINE": line, "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-c", code, *words.split()]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and expected in done.stdout, done.stdout + done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


@pytest.fixture
def own(tmp_path):
    """A configuration folder: an optimizer, a preset, and a group of budgets."""
    files = {
        "optimizer/mine.yaml": "_target_: torch.optim.RMSprop\nlr: 1e-3\n",
        "experiment/mine.yaml": "# @package _global_\ndefaults:\n  - quickstart\n  - /budget: small\n"
        "  - override /optimizer: mine\n  - _self_\nsteps: 3\neval_every: 3\n",
        "budget/small.yaml": "# @package _global_\nepsilon: 2\n",
        "budget/large.yaml": "# @package _global_\nepsilon: 5\n",
        "budget/rates/slow.yaml": "lr: 1e-5\n",
    }
    for name, text in files.items():
        path = tmp_path / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "own"


def test_own_groups_are_overridden_like_the_built_in_ones(command, own, tmp_path):
    done = command("train", "--config-dir", str(own), "experiment=mine")
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("runs/digits-cnn-rmsprop-eps2-*/result.json"))) == 1


@pytest.mark.parametrize(
    "flags",
    [["--config-dir", "own"], ["--config-dir=own"], ["-cd", "own"], ["hydra.searchpath=[file://own]"]],
    ids=" ".join,
)
@pytest.mark.parametrize(
    "overrides, epsilon, lr",
    [
        ("experiment=mine budget=large", 5, 1e-3),
        ("+budget=small optimizer=mine", 2, 1e-3),
        ("experiment=mine +budget/rates@optimizer=slow", 2, 1e-5),
        ("experiment=mine ~budget optimizer.lr=2", 8, 2),
    ],
)
def test_own_groups_are_known(command, own, flags, overrides, epsilon, lr):
    done = command("train", *overrides.split(), *flags, "--cfg", "job")
    assert done.returncode == 0, done.stderr
    composed = OmegaConf.create(done.stdout)
    assert composed.epsilon == epsilon and composed.optimizer.lr == lr


def test_what_is_no_group_is_refused(command, own):
    assert "budget is no key" in command("train", "budget=large").stderr
    assert "bugdet is no key: did you mean budget?" in command("train", "-cd", str(own), "bugdet=large").stderr
    missing = command("train", "--config-dir", "nowhere", "epsilon=8")
    assert missing.returncode == 1 and "nowhere' not found" in missing.stderr and "Traceback" not in missing.stderr


def test_flags_may_stand_between_overrides_and_old_values_are_read(command, tmp_path):
    words = ("experiment=quickstart", "-m", "seed=0,1", "engine=gram", "steps=2")
    done = command("estimate", *words)
    assert done.returncode == 0 and "2 runs, 0 of them finished" in done.stdout, done.stderr
    assert "(ghost)" in done.stdout and not list(tmp_path.glob("runs/*/*"))[1:]


@pytest.mark.parametrize(
    "line, expected",
    [
        ("dpopt ", " ".join(VERBS)),
        ("dpopt e", "estimate evaluate export"),
        ("dpopt train opti", "optimizer. optimizer="),
        ("dpopt estimate filter=k", "filter=kalman"),
        ("dpopt train experiment=quickstart -m batch", "batch_size="),
        ("dpopt train --config-dir own optimizer=mi", "optimizer=mine"),
        ("dpopt train -cd own bud", "budget"),
        ("dpopt train -cd own +budget=", "+budget=large +budget=small"),
        ("dpopt train --conf", ""),
        ("dpopt evaluate ru", ""),
        ("python run.py opti", "optimizer. optimizer="),
        ("python run.py --config-dir=own optimizer=mi", "optimizer=mine"),
    ],
)
def test_completion(line, expected, own, command, monkeypatch, capsys):
    monkeypatch.chdir(own.parent)
    monkeypatch.setattr(sys, "argv", ["dpopt"])
    monkeypatch.setenv("COMP_LINE", line)
    if line.startswith("python"):
        assert command("train", "-sc", "query=bash").stdout.split() == expected.split()
        return
    try:
        assert main(["-sc", "query=bash"]) == 0
    except SystemExit as error:
        assert not error.code
    assert capsys.readouterr().out.split() == expected.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_completion_in_bash(tmp_path):
    """The script that is installed, followed as the TAB key does."""
    program = tmp_path / "dpopt"
    program.write_text(f"#!{sys.executable}\n{CALL}\nsys.exit(code)\n")
    program.chmod(0o755)
    script = (
        'eval "$(dpopt -sc install=bash)"; complete -p dpopt\n'
        'COMP_LINE="dpopt train filter=k" COMP_CWORD=2; hydra_bash_completion; echo "${COMPREPLY[@]}"'
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, env=environment)
    installed, found = done.stdout.splitlines()
    assert "hydra_bash_completion dpopt" in installed and found == "filter=kalman", done.stderr
