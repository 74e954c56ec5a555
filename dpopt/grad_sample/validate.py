"""Before an engine is trusted with a model: its gradients of two examples beside those of ordinary backward passes."""

import torch
from torch import Tensor, nn

from dpopt.grad_sample.engine import GradSampler
from dpopt.grad_sample.fallback import output_tensors
from dpopt.grad_sample.modules import copy_shapes
from dpopt.grad_sample.norms import Gradients
from dpopt.grad_sample.outputs import examples_are_independent
from dpopt.grad_sample.per_sample import PerSampleGradients


def validate_against_autograd(engine: GradSampler, inputs: Tensor, targets: Tensor) -> None:
    """Before the first batch: hold the engine against ordinary backward passes of two examples.

    Images are replaced by noise and parameters moved a little, since a layer behind zeros or in front of them has no
    gradient to compare; the model is left as it was. Also found here is the shape in which parameters beside submodules
    enter, and what has to go through vmap after all.

    Args:
        engine: the engine, changed where it has to be.
        inputs: a micro-batch (B, K, …).
        targets: its targets (B, …).

    Raises:
        ValueError: for a parameter that the loss does not depend on, or whose gradient comes out otherwise.
    """
    if len(inputs) > 1:
        inputs, targets = inputs[:2], targets[:2]
    else:
        inputs, targets = torch.cat([inputs, inputs.roll(1, -1)]), torch.cat([targets, targets])
    parameters = {name: p for name, p in engine.model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    if inputs.is_floating_point():
        inputs = torch.randn(inputs.shape, generator=generator).to(inputs)
    before, precision = [p.detach().clone() for p in parameters.values()], engine.precision
    try:
        engine.precision = "fp32"  # without autocast: the rules are the same, the rounding is not
        with torch.no_grad():
            for p in parameters.values():
                p.add_((0.02 * torch.randn(p.shape, generator=generator)).to(p))
        wanted = [_ordinary(engine, parameters, x, y) for x, y in zip(inputs, targets, strict=True)]
        values = {name: p.detach() for name, p in parameters.items()}
        _fit_bare(engine, inputs[:, 0])
        per_sample = engine.sample_at(values, inputs, targets)
        _refuse_mixing(engine, inputs[:, 0])
        _compare(engine, wanted, per_sample)
        engine.validated = True
    finally:
        engine.precision = precision
        with torch.no_grad():
            for p, old in zip(parameters.values(), before, strict=True):
                p.copy_(old)


def _ordinary(engine: GradSampler, parameters: dict[str, nn.Parameter], views: Tensor, target: Tensor) -> Gradients:
    """The gradient of one example by an ordinary backward pass."""
    with torch.enable_grad(), engine.autocast():
        outputs = engine.forward({}, views)
        loss = engine.loss_fn(outputs, target.expand(len(views), *target.shape))
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    found = dict(zip(parameters, gradients, strict=True))
    unused = [name for name, gradient in found.items() if gradient is None]
    if unused:
        raise ValueError(
            f"the loss does not depend on {', '.join(unused)}, so only noise would move them: "
            "freeze them with requires_grad_(False) or remove them from the model"
        )
    return found


def _refuse_mixing(engine: GradSampler, inputs: Tensor) -> None:
    """Refuse a model that does with a batch what it does not do with its examples alone."""
    with engine.autocast():
        if examples_are_independent(lambda x: engine.forward({}, x), inputs, engine.precision != "fp32"):
            return
    raise ValueError(
        "the model mixes the examples of a batch: its output for an example is another one when the example comes "
        "alone, so it has no per-sample gradients; remove the operation over the batch dimension"
    )


def _fit_bare(engine: GradSampler, inputs: Tensor) -> None:
    """Find the shape of a copy per example with which every bare parameter acts on its own example only."""
    while engine.bare and engine.policy not in ("vmap", "loop"):
        shapes = {name: copy_shapes(engine.model.get_parameter(name).shape) for name in engine.bare}
        for i in range(max(len(candidates) for candidates in shapes.values())):
            guess = {name: candidates[min(i, len(candidates) - 1)] for name, candidates in shapes.items()}
            if _act_alone(engine, guess, inputs):
                engine.bare = guess
                return
        found = {}
        for name, candidates in shapes.items():
            fitting = [shape for shape in candidates if _act_alone(engine, {name: shape}, inputs)]
            if not fitting:
                engine.keep_whole(name)
                break
            found[name] = fitting[0]
        else:
            engine.bare = found
            return


def _act_alone(engine: GradSampler, shapes: dict[str, tuple[int, ...]], inputs: Tensor) -> bool:
    """Whether the model with different copies for two examples does with each what it does with that copy alone."""
    generator = torch.Generator().manual_seed(1)
    different = []
    for _ in inputs:
        parameters = {name: engine.model.get_parameter(name).detach() for name in shapes}
        different.append(
            {n: p + (0.5 * torch.randn(p.shape, generator=generator)).to(p) for n, p in parameters.items()}
        )
    copies = {n: torch.stack([one[n] for one in different]).view(len(inputs), *s[1:]) for n, s in shapes.items()}
    with torch.no_grad(), engine.autocast():
        alone = [engine.forward(one, x[None]) for one, x in zip(different, inputs, strict=True)]
        try:
            together = engine.forward(copies, inputs)
        except Exception:  # the copies do not fit
            return False
    for rows, *singles in zip(*map(output_tensors, (together, *alone)), strict=True):
        if any(x.ndim == 0 for x in singles):
            return False
        expected = torch.cat(singles)
        tolerance = _tolerance(engine) / 30 * expected.abs().max()
        if rows.shape != expected.shape or not bool((rows - expected).abs().max() <= tolerance):
            return False
    return True


def _compare(engine: GradSampler, wanted: list[Gradients], per_sample: PerSampleGradients) -> None:
    """Refuse gradients that differ by more than rounding explains."""
    relative = _tolerance(engine)
    for i, gradients in enumerate(wanted):
        sums = {n: torch.zeros_like(g, dtype=per_sample.norms.dtype) for n, g in gradients.items()}
        per_sample.add_weighted_sum(sums, torch.eye(2, dtype=per_sample.norms.dtype, device=per_sample.norms.device)[i])
        length = torch.stack([g.double().norm() for g in gradients.values()]).norm()
        errors = {name: (sums[name] - g).double().norm() for name, g in gradients.items()}
        wrong = [n for n, e in errors.items() if e > relative * (gradients[n].double().norm() + length / 30)]
        if not wrong and abs(per_sample.norms[i] - length) > relative / 2 * length:
            wrong = ["the norm"]
        if wrong:
            raise ValueError(
                f"the per-layer gradient of {', '.join(wrong[:3])} is not the one of an ordinary backward pass (a "
                "layer's parameters are used outside of it, its input has the examples not in the first dimension, "
                "or it mixes them): use engine=vmap"
            )


def _tolerance(engine: GradSampler) -> float:
    """Relative difference of two gradients that rounding may make: it turns a ReLU here and there on or off, which is
    worth up to half a percent of a gradient in fp32. Structural mistakes are worth a multiple of that."""
    return {8: 1e-6, 4: 0.03}.get(min(p.element_size() for p in engine.model.parameters()), 0.3)
