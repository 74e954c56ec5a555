"""Is dpopt right on this GPU? Norms and clipped sums of whole models in every way, compared with float64 on the CPU.

    python scripts/check_gpu.py                                   # all models, fp32 and bf16; a minute or two
    python scripts/check_gpu.py --models cnn --device cpu

Prints a line per model, precision and policy: the largest relative error of a norm, the relative error of the clipped
sum, and the length of the longest single contribution over C, which is the sensitivity. Autograd, one example at a
time in the same precision, shows what rounding explains. Ends with what waits for the GPU in one micro-batch. Exits
with 1 if anything is refused, longer than C, or more than twice as far off as autograd (a compiled graph: .001 more).
The kernels are held against torch by `pytest tests/optim/microadam/test_kernels.py tests/privacy/test_noise.py
tests/grad_sample/test_kernels_of_gradients.py`.
"""

import argparse
import collections
import copy
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpopt import models
from dpopt.grad_sample.engine import GradSampler
from dpopt.grad_sample.validate import validate_against_autograd
from dpopt.privacy.clipping import Flat

# Model, image size.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "cnn": (lambda: models.cnn(in_channels=3), 32),
    "wrn_16_4": (models.wrn_16_4, 32),
    "wrn_40_4": (models.wrn_40_4, 32),
    "resnet18": (lambda: models.resnet18(num_classes=10, small_images=True), 32),
    "resnet50": (lambda: models.resnet50(num_classes=10), 64),
    "nf_resnet50": (lambda: models.nf_resnet50(num_classes=10), 64),
    "deit_tiny": (lambda: models.deit_tiny(num_classes=10, pretrained=False, zero_head=False), 224),
}
POLICIES = ("auto", "store", "recompute", "ghost", "vmap")
EXAMPLES, VIEWS = 4, 2
LONG = 1 + 1e-5


class Expected:
    """Norms, a clipping norm and the clipped sum of a model in float64.

    Attributes:
        inputs, targets: the examples, (4, 2, 3, size, size) and (4,).
        norms: of per-example gradients, (4,).
        clip: clips half of them.
        total: the clipped sum, one vector.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        self.inputs = torch.randn(EXAMPLES, VIEWS, 3, size, size)
        self.targets = torch.randint(0, 10, (EXAMPLES,))
        self.norms, gradients = by_autograd(copy.deepcopy(model).double(), self.inputs.double(), self.targets)
        self.clip = Flat(float(self.norms.median()))
        self.total = self.clip.weight(self.norms) @ gradients

    def errors(self, norms: Tensor, total: Tensor) -> tuple[float, float]:
        """Compute the largest relative error of norms, and of the clipped sum."""
        of_norms = ((norms - self.norms).abs() / self.norms).max()
        return float(of_norms), float((total - self.total).norm() / self.total.norm())


def by_autograd(model: nn.Module, inputs: Tensor, targets: Tensor, bf16: bool = False) -> tuple[Tensor, Tensor]:
    """Norms (n,) and gradients (n, parameters) in float64 on the CPU, taken one example at a time."""
    rows = []
    for views, target in zip(inputs, targets, strict=True):
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(views), target.expand(len(views)))
        rows.append(flat(torch.autograd.grad(loss, list(model.parameters()))))
    gradients = torch.stack(rows)
    return gradients.norm(dim=1), gradients


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """One float64 vector on the CPU."""
    return torch.cat([t.detach().double().cpu().flatten() for t in tensors])


def compare(model: nn.Module, expected: Expected, sampler: GradSampler, device: torch.device) -> tuple[float, ...]:
    """Compute errors of norms and clipped sum, and the longest contribution over C."""
    x, y = expected.inputs.to(device), expected.targets.to(device)
    validate_against_autograd(sampler, x, y)

    def summed(keep: Tensor) -> tuple[Tensor, Tensor]:
        per_sample = sampler(x, y)
        sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        per_sample.add_weighted_sum(sums, expected.clip.weight(per_sample.norms) * keep.to(per_sample.norms))
        return per_sample.norms.double().cpu(), flat(sums.values())

    errors = expected.errors(*summed(torch.ones(EXAMPLES)))
    longest = max(float(summed(one)[1].norm()) for one in torch.eye(EXAMPLES))
    return *errors, longest / expected.clip.sensitivity


def check(name: str, device: torch.device, precisions: list[str], policies: list[str]) -> bool:
    """Print a line per precision and policy of a model; tell whether all is well."""
    torch.manual_seed(0)
    make, size = MODELS[name]
    model = make()
    expected = Expected(model, size)
    model.to(device)
    well = True
    for precision in precisions:
        x, y = expected.inputs.to(device), expected.targets.to(device)
        norms, gradients = by_autograd(model, x, y, precision == "bf16")
        of_norms, rounding = expected.errors(norms, expected.clip.weight(norms) @ gradients)
        print(f"{name:12s} {precision} {'autograd':14s} norms {of_norms:.1e}  sum {rounding:.1e}", flush=True)
        for policy in policies:
            *way, last = policy.split()
            line = f"{name:12s} {precision} {policy:14s}"
            try:
                sampler = GradSampler(model, F.cross_entropy, last, precision=precision, compiled=bool(way))
                of_norms, of_sum, longest = compare(model, expected, sampler, device)
            except Exception as error:  # whatever it is, the line says so
                print(f"{line} FAILED {type(error).__name__}: {str(error).splitlines()[0][:160]}", flush=True)
                well = False
                continue
            good = of_sum < (1e-3 if way else 1e-6) + 2 * rounding and longest < LONG
            well &= good
            text = f"norms {of_norms:.1e}  sum {of_sum:.1e}  longest / C {longest:.7f}"
            print(f"{line} {text}{'' if good else '  <-- LOOK'}", flush=True)
    return well


def waits(device: torch.device) -> None:
    """Print what waits for the GPU in one micro-batch, by the line that does."""
    model = models.wrn_16_4().to(device)
    x, y = torch.randn(8, 1, 3, 32, 32, device=device), torch.zeros(8, dtype=torch.long, device=device)
    sampler = GradSampler(model, F.cross_entropy, "store", precision="bf16")
    validate_against_autograd(sampler, x, y)
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    clip = Flat(1.0)
    for mode in ("default", "warn"):  # the first time, layouts are looked at
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode(mode)
            per_sample = sampler(x, y)
            per_sample.add_weighted_sum(sums, clip.weight(per_sample.norms))
            torch.cuda.set_sync_debug_mode("default")
    lines = collections.Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchron" in str(w.message))
    print(f"waits for the GPU in a micro-batch: {sum(lines.values())} {dict(lines)}")


def main() -> None:
    """Check, and exit with 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), help="'compiled auto' for a compiled graph")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.backends.cudnn.allow_tf32 = False  # which torch allows convolutions: the comparison would be blunt
    well = all([check(name, device, arguments.precisions, arguments.policies) for name in arguments.models])
    if device.type == "cuda":
        waits(device)
    sys.exit(not well)


if __name__ == "__main__":
    main()
