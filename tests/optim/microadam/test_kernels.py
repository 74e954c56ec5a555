"""The C and Triton kernels against their reference, bit for bit: Triton on a GPU, or else in its interpreter."""

import csv
import importlib.util
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from torch import nn

from dpopt.optim import MicroAdam

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = (1, 2, 63, 1025, 4096, 4097, 100_003)
HAVE = {"c": DEVICE == "cpu" and shutil.which("cc"), "triton": importlib.util.find_spec("triton")}
if HAVE["triton"] and DEVICE == "cpu":
    # The interpreter of Triton 3.6 makes an int of an array of one number, which NumPy 2.4 forbids; compiled kernels
    # never pass there.
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    HAVE["triton"] = triton >= (3, 7) or numpy < (2, 4)
C, TRITON = (pytest.param(k, marks=pytest.mark.skipif(not have, reason=f"no {k} here")) for k, have in HAVE.items())

# Triton interprets on NumPy.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")]


def trained(kernels, dtype=torch.float32, steps=3, sizes=SIZES, **options):
    """Parameters of all sizes after some steps, gradients among them that are zero, constant, NaN and infinite."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(n, generator=generator).to(DEVICE, dtype)) for n in sizes]
    optimizer = MicroAdam(parameters, lr=0.01, kernels=kernels, **options)
    for step in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(DEVICE, dtype)
        if len(parameters) > 4:
            parameters[4].grad[:] = 0.0 if step % 2 else 2.5
            parameters[3].grad = None if step == 1 else parameters[3].grad
        if step == 2:
            parameters[-1].grad[7], parameters[-1].grad[50_000:50_100] = float("nan"), float("inf")
        optimizer.step()
    return parameters, optimizer


def assert_same(one, other):
    for p, q in zip(one[0], other[0], strict=True):
        assert torch.equal(p.nan_to_num(7), q.nan_to_num(7))
        state, twin = one[1].state[p], other[1].state[q]
        assert set(state) == set(twin)
        for name, value in state.items():
            same = torch.equal(value.nan_to_num(7), twin[name].nan_to_num(7)) if name != "step" else value == twin[name]
            assert same, name


@pytest.mark.parametrize(
    "kernels, dtype",
    [
        pytest.param("c", torch.float32, marks=C.marks),
        pytest.param("triton", torch.float32, marks=TRITON.marks),
        pytest.param("triton", torch.bfloat16, marks=TRITON.marks),
    ],
)
@pytest.mark.parametrize("options", [{}, dict(bits=32), dict(bits=8, rounding="stochastic", weight_decay=0.1)])
def test_all_sizes(kernels, dtype, options):
    assert_same(trained("torch", dtype, **options), trained(kernels, dtype, **options))


@pytest.mark.parametrize("kernels", [C, TRITON])
@pytest.mark.parametrize(
    "options",
    [
        dict(bits=2, bucket=64),
        dict(bits=4, rounding="stochastic", window=1),
        dict(bits=8, bucket=4096, density=0.1, window=3),
        dict(bits=2, bucket=8, error_feedback=False),
        dict(dense_size=0, density=0.0001),
        dict(bucket=16_384, density=0.02),
    ],
)
def test_all_options(kernels, options):
    sizes = (5, 20_000, 17_001) if "bucket" in options else (5, 2000, 5001)
    assert_same(*(trained(k, steps=7, sizes=sizes, **options) for k in ("torch", kernels)))


@pytest.mark.parametrize("kernels", [C])
@pytest.mark.parametrize(
    "options",
    [
        dict(bucket=24),
        dict(density=0.5),
        dict(scope="tensor"),
        dict(scope="tensor", bits=32, dense_size=0),
        dict(bits=32),
    ],
)
def test_more_options_in_c(kernels, options, monkeypatch):
    """Blocks of any size, dense windows, and so many blocks that two threads share them."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    sizes = (1025, 900_001) if options == dict(bits=32) else (1025, 12_007, 20_001)
    assert_same(*(trained(k, steps=4, sizes=sizes, **options) for k in ("torch", kernels)))


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(window=None), "unbounded window"),
        (dict(scope="tensor"), "scope=block"),
        (dict(scope="tensor", bits=32, dense_size=0, size=1), "blocks of 1 values"),
        (dict(dtype=torch.float64), "float64"),
        (dict(bucket=24), "power of two"),
        (dict(density=0.5), "at most 8,192"),
        (dict(window=20_000), "at most 8,192"),
    ],
)
def test_what_triton_does_not_take_is_said(options, reason):
    parameter = nn.Parameter(torch.zeros(options.pop("size", 5001), device=DEVICE, dtype=options.pop("dtype", None)))
    parameter.grad = torch.ones_like(parameter)
    optimizer = MicroAdam([parameter], kernels="triton", **options)
    with pytest.raises(ValueError, match=f"{reason}.*use kernels=auto or torch"):
        optimizer.step()
    assert optimizer.state[parameter]["step"] == 0 and (parameter == 0).all()


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(window=None), "unbounded window"),
        (dict(scope="tensor", size=40_000), "scope=block"),
        (dict(dtype=torch.bfloat16), "float32"),
        (dict(dtype=torch.float64, bits=32), "float32"),
    ],
)
@pytest.mark.skipif(DEVICE != "cpu", reason="a matter of the CPU")
def test_what_c_does_not_take_goes_to_the_reference(options, reason):
    parameter = nn.Parameter(torch.zeros(options.pop("size", 5001), dtype=options.pop("dtype", None)))
    parameter.grad = torch.ones_like(parameter)
    MicroAdam([parameter], **options).step()
    before = parameter.detach().clone()
    optimizer = MicroAdam([parameter], kernels="c", **options)
    with pytest.raises(ValueError, match=f"{reason}.*use kernels=auto or torch"):
        optimizer.step()
    assert torch.equal(parameter, before) and (before != 0).any()


def test_without_a_compiler(monkeypatch, tmp_path):
    """None, one that fails, one that works: built once, into the user's cache."""
    from dpopt.optim.microadam.cpu import library
    from dpopt.optim.microadam.dispatch import _warned

    parameter = nn.Parameter(torch.zeros(5001))
    parameter.grad = torch.ones_like(parameter)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        for compiler, reason in (("no-such-compiler", "no C compiler was found"), ("false", "/false failed")):
            monkeypatch.setenv("CC", compiler)
            library.cache_clear()
            _warned.clear()
            with pytest.raises(ValueError, match=f"kernels=c cannot be used: .*{reason}"):
                MicroAdam([parameter], kernels="c").step()
            optimizer = MicroAdam([parameter])
            with pytest.warns(UserWarning, match=f"without its c kernels.*{reason}"):
                optimizer.step()
            optimizer.step()  # says it once
            assert not list(tmp_path.rglob("*.so"))
        if shutil.which("cc"):
            monkeypatch.delenv("CC")
            for _ in range(2):
                library.cache_clear()
                MicroAdam([parameter], kernels="c").step()
                monkeypatch.setattr(subprocess, "run", None)
            assert len(list(tmp_path.rglob("*"))) == 2
    finally:
        library.cache_clear()


def test_without_triton(monkeypatch):
    parameter = nn.Parameter(torch.zeros(5001))
    parameter.grad = torch.ones_like(parameter)
    monkeypatch.setitem(sys.modules, "triton", None)
    MicroAdam([parameter], kernels="auto" if DEVICE == "cpu" else "torch").step()
    with pytest.raises(ValueError, match="pip install triton"):
        MicroAdam([parameter], kernels="triton").step()
    if DEVICE == "cpu":
        monkeypatch.undo()
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
            MicroAdam([parameter], kernels="triton").step()


def test_a_training_is_the_same(command, tmp_path):
    """Digits, 40 steps: the same losses, to the last digit."""
    found = []
    for one in ["torch", *(kernels for kernels, have in HAVE.items() if have)]:
        length = ("steps=40", "eval_every=8", "epsilon=1", "randomness=research")
        words = ("experiment=quickstart", *length, f"optimizer.kernels={one}")
        done = command("train", *words, f"output_dir={tmp_path / one}")
        assert done.returncode == 0, done.stderr
        with next((tmp_path / one).glob("*/metrics.csv")).open() as file:
            rows = [(row["step"], row["test/loss"], row["optimizer/effective_step"]) for row in csv.DictReader(file)]
        found.append(rows)
    assert len(found[0]) == 5 and all(rows == found[0] for rows in found)
