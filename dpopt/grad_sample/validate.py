"""Validate a model, its loss and its per-sample gradients before data enter, and again whenever something changes.

Four checks on one micro-batch of the real shape; afterwards the model is what it was, to the bit:

    state       a forward leaves nothing of the data in the model (`state_check`)
    forward     no example's input enters another's output (`forward_check`)
    loss        the loss of a batch is the mean of the losses of its examples (`losses`)
    gradients   per-sample gradients equal those of ordinary backward passes (`gradient_check`)

Loss and gradients are compared in a float64 copy to 1e-6, so that rounding hides nothing. Parameters are moved a
little, since a layer behind zeros shows nothing of what it does. What comes out not finite is not validated.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from dpopt.grad_sample.engine import GradSampler
from dpopt.grad_sample.forward_check import Limits, check_independence, check_outputs, check_places, replacements
from dpopt.grad_sample.gradient_check import (
    check_gradient_independence,
    validate_against_autograd,
    validate_losses,
)
from dpopt.grad_sample.losses import check_loss, loss_in_float64
from dpopt.grad_sample.model_check import check_model
from dpopt.grad_sample.nested import map_tensors
from dpopt.grad_sample.snapshot import undisturbed
from dpopt.grad_sample.state_check import check_repeatable, check_settled, check_state
from dpopt.grad_sample.trial import accepted, float64_copy, in_float64, other_than, perturb, trials

__all__ = ["covered", "validate", "validate_against_autograd"]
_FEW = 4  # rows that a forward is tried on at least, and examples whose losses are compared


def covered(engine: GradSampler, inputs: Tensor, gradients: bool = True) -> bool:
    """Tell whether inputs (B, K, …) of this shape may enter the model in its present state."""
    return engine.validations.covers(engine.model, engine.loss_fn, inputs, gradients)


def validate(
    engine: GradSampler,
    inputs: Tensor,
    targets: Tensor,
    present: Tensor | None = None,
    gradients: bool = True,
) -> None:
    """Validate the engine's model, loss and gradients on a micro-batch.

    Args:
        engine: changed where layers must go through vmap.
        inputs: a micro-batch (B, K, …).
        targets: its targets (B, …).
        present: (B,), False on pads; None for no pads. With pads alone, noise takes their place, and the next
            micro-batch is validated again.
        gradients: whether gradients are taken; otherwise losses only.

    Raises:
        ValueError: naming the layer, the reason and the fix.
    """
    model = engine.model
    check_model(model, private=True)
    real, labels = (inputs, targets) if present is None else (inputs[present], targets[present])
    empty = len(real) == 0
    real, labels = (torch.zeros_like(inputs[:1]), targets[:1]) if empty else (real, labels)
    views, rounding = inputs.shape[1], 0.1 if engine.precision == "bf16" else _rounding(model)
    with undisturbed(model), torch.no_grad():
        perturb(model)
        limits = Limits(rounding, float64_copy(model))
        examples, written = _validate_forward(engine, limits, real.flatten(0, 1), max(_FEW, len(inputs)) * views)
        _validate_loss(engine, limits.exact, examples, labels, views)
    if not gradients:
        validate_losses(engine, real, labels)
    else:
        if not empty:
            with undisturbed(model), suppress(ValueError):  # what fails is named below
                engine(inputs, targets)  # settles what is done with each layer, which is what must be right
        validate_against_autograd(engine, real, labels)
        if len(inputs) > 1:
            with undisturbed(model):
                perturb(model)
                examples = examples.unflatten(0, (-1, views))
                targets = labels[torch.arange(len(examples), device=labels.device) % len(labels)]
                check_gradient_independence(engine, examples, targets, rounding)
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        names = [*module.__dict__, *module._buffers]
        engine.validations.written |= {(module, key) for key in names if prefix + key in written}
    if not empty:
        engine.validations.add(model, engine.loss_fn, inputs, gradients)


def _validate_forward(engine: GradSampler, limits: Limits, rows: Tensor, count: int) -> tuple[Tensor, set[str]]:
    """Check what a forward of `count` examples writes and mixes; return the examples, and what it writes."""
    model = engine.model

    def forward(x: Tensor) -> Any:
        with engine.autocast():
            return engine.forward({}, x)

    def direct(x: Tensor) -> Any:
        with engine.autocast():
            return model(x)

    def outputs_of(outputs: Any, rows: int) -> None:
        check_outputs(model, outputs, rows)

    examples, outputs = accepted(model, forward, outputs_of, trials(model, rows, count))
    written = check_state(model, direct, examples, other_than(examples, forward))
    outputs = check_repeatable(model, forward, examples, outputs)
    check_settled(model, direct, examples)
    check_independence(model, forward, examples, outputs, replacements(examples), limits)
    check_places(model, forward, examples, outputs, limits)
    return examples, written


def _validate_loss(engine: GradSampler, exact: nn.Module | None, examples: Tensor, targets: Tensor, views: int) -> None:
    """Check the loss on outputs of a few examples, in float64 where model and loss can."""
    count = min(_FEW, max(2, len(examples) // views))
    examples = examples[torch.arange(count * views, device=examples.device) % len(examples)]
    targets = targets[torch.arange(count, device=targets.device) % len(targets)]
    loss_fn, outputs = engine.loss_fn, None
    if exact is not None:
        try:
            outputs, loss_fn = exact(in_float64(examples)), loss_in_float64(engine.loss_fn)
            loss_fn(map_tensors(lambda x: x[:views] if x.ndim else x, outputs), targets[:1].repeat_interleave(views, 0))
        except Exception:  # code that wants the dtype of the model
            outputs, loss_fn = None, engine.loss_fn
    check_loss(loss_fn, engine.model, engine.forward({}, examples) if outputs is None else outputs, targets, views)


def _rounding(model: nn.Module) -> float:
    """Bound outputs' rounding in the model's dtype, relative to the largest."""
    known = {torch.float64: 1e-9, torch.float32: 1e-3}
    return max(known.get(p.dtype, 0.1) for p in model.parameters() if p.is_floating_point())
