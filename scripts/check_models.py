"""Take one private step of many small, randomly chosen timm models: each exact, or refused in one sentence.

    python scripts/check_models.py [--count 100] [--seed 0] [--out experiments/results/benchmarks/models.md]

Every model is built with random weights at the smallest image size that it accepts, and tried as it comes (in train
mode) and in eval mode, on a batch of three examples. Exact means that the sum of the gradients, clipped at a norm that
none reaches, equals a loop of ordinary backward passes to 1e-6 in float64 (1e-3 in float32 where a model has no float64
form). What raises anything but a ValueError of one sentence counts as a traceback.
"""

import argparse
import contextlib
import random
import re
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpopt.privacy.clipping import Flat
from dpopt.privacy.plan import PrivacyPlan
from dpopt.privacy.private_gradient import PrivateGradient
from dpopt.privacy.sampling import PoissonBatch
from dpopt.rng import RandomKey

SIZES = (32, 64, 96, 128, 160, 192, 224, 256)
LARGEST = 12e6  # parameters
SECONDS = 240  # for one model and mode
EXAMPLES = 3


class TooSlowError(Exception):
    """A model took longer than `SECONDS`."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise `TooSlowError` after some seconds."""

    def stop(number: int, frame: Any) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def build(name: str) -> tuple[nn.Module, int] | None:
    """Build a model at the smallest image size that it accepts; None for large models."""
    with torch.device("meta"):
        try:
            if sum(p.numel() for p in timm.create_model(name, num_classes=3).parameters()) > LARGEST:
                return None
        except (RuntimeError, NotImplementedError):  # something in its constructor has no shape-only form
            pass
    create: Any = timm.create_model
    options: dict[str, Any]
    for size in SIZES:
        for options in ({"img_size": size}, {}):
            torch.manual_seed(0)
            try:
                model: nn.Module = create(name, num_classes=3, **options)
                with torch.no_grad():
                    outputs = model.eval()(torch.randn(2, 3, size, size))
                if outputs.shape == (2, 3) and bool(outputs.isfinite().all()):
                    return (model.train(), size) if sum(p.numel() for p in model.parameters()) <= LARGEST else None
            except Exception:  # models refuse sizes in many ways
                continue
    return None


def private_sum(model: nn.Module, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    """Sum the gradients as `PrivateGradient` does, without noise and with a clip norm out of reach."""
    plan = PrivacyPlan(0.0, len(inputs), len(inputs), 1, 1e-5, key=RandomKey.from_seed(0, "check"))
    private = PrivateGradient(model, F.cross_entropy, plan, Flat(1e30))
    mask = torch.ones(len(inputs), dtype=torch.bool)
    private.backward(PoissonBatch(plan, 0, torch.arange(len(inputs)), iter([(inputs[:, None], targets, mask)])))
    return [p.grad for p in model.parameters() if p.grad is not None]


def looped_sum(model: nn.Module, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    """Average the gradients of single examples by ordinary backward passes."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    for x, y in zip(inputs, targets, strict=True):
        loss = F.cross_entropy(model(x[None]), y[None])
        for t, g in zip(total, torch.autograd.grad(loss, parameters, materialize_grads=True), strict=True):
            t += g / len(inputs)
    return total


def tried(model: nn.Module, size: int) -> tuple[str, str]:
    """Return what became of a model, and the reason if it was refused."""
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(EXAMPLES, 3, size, size, generator=generator), torch.arange(EXAMPLES) % 3
    tolerance = 1e-3
    try:
        with time_limit(SECONDS), torch.no_grad():
            model.double()(inputs.double())
        inputs, tolerance = inputs.double(), 1e-6
    except Exception:
        model.float()
    try:
        with time_limit(SECONDS):
            found, expected = private_sum(model, inputs, targets), looped_sum(model, inputs, targets)
    except ValueError as error:
        return ("refused" if len(str(error).splitlines()) == 1 else "traceback"), str(error)
    except TooSlowError:
        return "too slow", f"more than {SECONDS} s"
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    length = torch.stack([g.norm() for g in expected]).norm()
    off = torch.stack([(f - e).norm() for f, e in zip(found, expected, strict=True)]).norm() / length
    return ("exact", "") if off <= tolerance else ("WRONG", f"relative difference {off:.1e}")


def reason_of(text: str) -> str:
    """Shorten a message to its kind."""
    for pattern, kind in (
        (r"\((\w*BatchNorm\w*|\w*Norm\w*)\) mixes", "BatchNorm in train mode"),
        (r"draws random numbers", "dropout or drop path"),
        (r"gives different outputs", "random forward"),
        (r"mixes the examples", "mixes examples"),
        (r"does not depend on", "a parameter outside of the loss"),
        (r"writes", "forward writes into the model"),
        (r"not the one of an ordinary", "gradient not exact"),
        (r"no gradients of single examples", "an operation without per-example gradient"),
        (r"changed in place", "input changed in place"),
        (r"not turn tensors", "layer without examples first"),
    ):
        if re.search(pattern, text):
            return kind
    return text[:80]


def main(count: int, seed: int, out: Path | None) -> None:
    """Try `count` models and print a table."""
    warnings.simplefilter("ignore")
    names = sorted(timm.list_models())
    random.Random(seed).shuffle(names)
    rows: list[tuple[str, int, str, str, str]] = []
    models = 0
    for name in names:
        if models == count:
            break
        try:
            with time_limit(SECONDS):
                made = build(name)
        except TooSlowError:
            continue
        if made is None:
            continue
        models += 1
        model, size = made
        for mode in ("train", "eval"):
            began = time.perf_counter()
            status, text = tried(model.train(mode == "train"), size)
            rows.append((name, size, mode, status, text))
            print(
                f"{models:3d} {name} {size} {mode}: {status} {time.perf_counter() - began:.0f}s {text[:300]}",
                flush=True,
            )
    page = render(models, seed, rows)
    print(page)
    if out is not None:
        out.write_text(page)


def render(models: int, seed: int, rows: list[tuple[str, int, str, str, str]]) -> str:
    """Write counts, then one line per model and mode."""
    lines = [
        "# Small random timm models, one private step each",
        "",
        f"`python scripts/check_models.py --count {models} --seed {seed}`; timm {timm.__version__}, torch "
        f"{torch.__version__}. {models} models of at most {LARGEST / 1e6:.0f} M parameters, as built (train) and in "
        "eval mode, at the smallest image size that they accept. Exact: the sum of gradients equals a loop of ordinary "
        "backward passes to 1e-6 in float64. No model raised anything but one sentence, unless a line says traceback.",
        "",
        "| mode | status | reason | models |",
        "|---|---|---|---:|",
    ]
    counts = Counter((mode, status, reason_of(text) if text else "") for _, _, mode, status, text in rows)
    lines += [f"| {mode} | {status} | {why} | {n} |" for (mode, status, why), n in sorted(counts.items())]
    lines += ["", "BatchNorm in train mode is left out here.", ""]
    lines += ["| model | size | mode | status | reason |", "|---|---:|---|---|---|"]
    for name, size, mode, status, text in sorted(rows):
        if reason_of(text) == "BatchNorm in train mode":
            continue
        lines.append(f"| {name} | {size} | {mode} | {status} | {text.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    main(arguments.count, arguments.seed, arguments.out)
