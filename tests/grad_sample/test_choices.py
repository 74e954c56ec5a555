"""What is fastest on this machine: measured once, remembered, taken along by a run."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpopt.grad_sample import choices as module
from dpopt.grad_sample.choices import Choices, fastest, using
from dpopt.grad_sample.engine import GradSampler
from dpopt.grad_sample.validate import validate_against_autograd
from dpopt.training.build import _even

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A clock that only `takes` moves, and an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    module._read.cache_clear()
    now = [0.0]
    monkeypatch.setattr(module, "_now", lambda device: now[0])
    yield now
    module._read.cache_clear()
    module._machine.cache_clear()


def ways(clock, done, **seconds):
    def way(name):
        def run():
            clock[0] += seconds[name].pop(0) if len(seconds[name]) > 1 else seconds[name][0]
            done.append(name)
            return name

        return run

    return {name: way(name) for name in seconds}


def test_the_fastest_is_taken(clock):
    """By its best time; the first one, which pays for memory and libraries, does not count."""
    done = []
    given = ways(clock, done, first=[0.03], second=[1.0, 0.02])
    assert fastest("this", CPU, given) == "first" and done == ["first"]  # where nobody measures
    choices = Choices()
    with using(choices):
        assert fastest("this", CPU, given) == "second" and choices.made == {"this": "second"}
        tried = len(done)
        assert fastest("this", CPU, given) == "second" and len(done) == tried + 1
        assert fastest("that", CPU, {"only": lambda: 7}) == 7 and "that" not in choices.made


def test_what_follows_is_timed_along(clock):
    """The second way is faster, but takes longer in the end; what follows is left to the caller."""
    done = []

    def then(name):
        clock[0] += {"first": 0.01, "second": 0.05}[name]
        done.append("then")

    with using(Choices()):
        assert fastest("this", CPU, ways(clock, done, first=[0.03], second=[0.02]), then) == "first"
    assert done[-1] == "first"


def test_slow_ways_are_not_tried_often(clock):
    done = []
    Choices().find("this", CPU, ways(clock, done, slow=[60.0], quick=[0.01]))
    assert done.count("slow") == 2 and done.count("quick") == 4


def test_it_is_remembered_on_this_machine(clock, tmp_path):
    done = []
    given = ways(clock, done, first=[0.2], second=[0.1])
    assert Choices().find("this", CPU, given) == "second"
    del done[:]
    module._read.cache_clear()  # as in another process
    assert Choices().find("this", CPU, given) == "second" and not done
    assert Choices().find("this", CPU, {"first": given["first"], "third": given["first"]}) == "first"  # a way that went


def test_other_code_is_measured_again(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CODE", tmp_path)
    for first, best in ((0.2, "second"), (0.05, "first")):
        (tmp_path / "conv.py").write_text(f"# takes {first} s")
        module._machine.cache_clear()  # as in another process
        assert Choices().find("this", CPU, ways(clock, [], first=[first], second=[0.1])) == best


def test_processes_agree(clock, tmp_path):
    """One that measures while another writes takes what the other found."""

    def interrupted():
        clock[0] += 0.1
        (path,) = [tmp_path / "dpopt" / f"fastest-{module._machine('cpu')}.json"]
        path.write_text(json.dumps({"this": "slow"}))

    slow = ways(clock, [], slow=[0.5])["slow"]
    assert Choices().find("this", CPU, {"slow": slow, "quick": interrupted}) == "slow"


def test_without_a_folder(clock, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    given = ways(clock, [], first=[0.2], second=[0.1])
    choices = Choices()
    assert choices.find("this", CPU, given) == "second" and choices.find("this", CPU, given) == "second"


def test_those_of_an_earlier_run_count(clock):
    done = []
    given = ways(clock, done, first=[0.2], second=[0.1])
    choices = Choices()
    choices.made["this"] = "first"
    with using(choices):
        assert fastest("this", CPU, given) == "first" and done == ["first"]


@pytest.mark.parametrize("content", ['{"this": []}', '{"this": {"a": 1}}', '{"this": null}', "[1]", '{"this'])
def test_a_damaged_file_is_measured_again(clock, tmp_path, content):
    path = tmp_path / "dpopt" / f"fastest-{module._machine('cpu')}.json"
    path.parent.mkdir()
    path.write_text(content)
    assert Choices().find("this", CPU, ways(clock, [], first=[0.2], second=[0.1])) == "second"
    assert json.loads(path.read_text())["this"] == "second"


def test_hooks_measure_in_the_thread_that_runs_them(clock, monkeypatch):
    """With a GPU, autograd calls hooks in another thread."""
    pool, grad = ThreadPoolExecutor(1), torch.autograd.grad
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.Flatten(), nn.Linear(40 * 16, 2))
    inputs, targets = torch.randn(4, 1, 3, 6, 6), torch.tensor([0, 1, 0, 1])
    sampler = GradSampler(model, F.cross_entropy, "auto")
    validate_against_autograd(sampler, inputs, targets)
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: pool.submit(grad, *args, **kwargs).result())
    sampler(inputs, targets)
    assert any(what.startswith("convolution") for what in sampler.choices.made)


@pytest.mark.parametrize("most, batch_size", [(2560, 4096), (1946, 4096), (64, 4096), (2560, 64), (7, 100), (1, 8)])
def test_micro_batches_of_a_gpu_are_even(most, batch_size):
    """Two standard deviations more than is expected fit into as few as must be, and little is padding."""
    size, large = _even(most, batch_size), batch_size + 2 * math.sqrt(batch_size)
    count = math.ceil(large / size)
    assert size <= most and count == math.ceil(large / most) and count * size < large + count
