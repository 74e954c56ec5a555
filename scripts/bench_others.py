"""The same step by other libraries, for `bench_engine.py`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

Autocast = Callable[[torch.device], torch.autocast]


def opacus_step(how: str, model: nn.Module, x: torch.Tensor, y: torch.Tensor, autocast: Autocast) -> Callable[[], None]:
    """Make Opacus's, by hooks or in two passes; it knows no views: each counts as an example."""
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    examples, flat, labels = len(x), x.flatten(0, 1), y.repeat_interleave(x.shape[1])
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    noise = dict(noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=examples)
    if how == "hooks":
        wrapped = GradSampleModule(model)
        optimizer = DPOptimizer(sgd, **noise)

        def hooks() -> None:
            optimizer.zero_grad()
            with autocast(x.device):
                loss = F.cross_entropy(wrapped(flat), labels)
            loss.backward()
            optimizer.clip_and_accumulate()

        return hooks
    ghost = GradSampleModuleFastGradientClipping(model, max_grad_norm=1.0)
    fast = DPOptimizerFastGradientClipping(sgd, **noise)
    criterion = DPLossFastGradientClipping(ghost, fast, nn.CrossEntropyLoss())

    def two_passes() -> None:
        fast.zero_grad()
        with autocast(x.device):
            loss = criterion(ghost(flat), labels)
        loss.backward()

    return two_passes


def opake_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor, autocast: Autocast) -> Callable[[], None]:
    """Make Opake's, by vmap."""
    from opake.dpsgd.clipping import clipped_grad

    values = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, torch.Tensor], views: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(functional_call(model, values, (views,)), label.expand(len(views)))

    gradient, state = clipped_grad(loss, clipping_norm=1.0, batch_argnums=(1, 2))

    def step() -> None:
        nonlocal state
        with autocast(x.device):
            _, state = gradient(values, x, y, state=state)

    return step
