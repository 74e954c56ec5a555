"""Compare per-sample gradients with ordinary backward passes, example by example."""

import torch
from torch import Tensor

from dpopt.grad_sample.engine import GradSampler
from dpopt.grad_sample.forward_check import places, replacements
from dpopt.grad_sample.losses import loss_in_float64
from dpopt.grad_sample.modules import copy_shapes
from dpopt.grad_sample.nested import map_tensors, output_tensors
from dpopt.grad_sample.norms import Gradients
from dpopt.grad_sample.per_sample import PerSampleGradients
from dpopt.grad_sample.snapshot import Snapshot, undisturbed
from dpopt.grad_sample.trial import differ, float64_copy, in_float64, perturb, trials

Pair = tuple[Tensor, Tensor]  # two examples (2, K, …) and their targets


def validate_against_autograd(engine: GradSampler, inputs: Tensor, targets: Tensor) -> None:
    """Compare the engine's gradients of two examples with those of autograd.

    Images are replaced by noise and parameters moved a little, since a layer behind zeros or in front of them has no
    gradient to compare; the model is left as it was. A float64 copy is compared to 1e-6, where there can be one. Also
    found here is the shape in which parameters next to submodules enter, and what has to go through vmap after all.

    Args:
        engine: changed where it has to be.
        inputs: a micro-batch (B, K, …).
        targets: its targets (B, …).

    Raises:
        ValueError: for a parameter that the loss does not depend on, or whose gradient comes out otherwise.
    """
    with undisturbed(engine.model):
        perturb(engine.model)
        tested, pair, references = _tested(engine, inputs, targets)
        _compare(tested, pair, references, _sample(tested, pair))
    engine.adopt(tested)
    engine.validated = True


def validate_losses(engine: GradSampler, inputs: Tensor, targets: Tensor) -> None:
    """Compare the engine's losses of two examples with those of each alone.

    Raises:
        ValueError: for a loss that comes out otherwise.
    """
    with undisturbed(engine.model), torch.no_grad():
        perturb(engine.model)
        for examples, labels in _pairs(engine, inputs, targets):
            try:
                alone = torch.stack([_loss(engine, x, y) for x, y in zip(examples, labels, strict=True)])
                together = engine.losses(examples, labels)
            except Exception as error:
                raise ValueError(_unsampled(engine, examples, error)) from error
            if bool(alone.isfinite().all()):
                break
    if not bool(((together - alone).abs() <= 0.03 * (1e-3 + alone.abs())).all()):
        raise ValueError(
            "the losses of several examples at once, under torch.func.vmap, are not those of single examples, or not "
            "finite: set engine=loop, or replace layers that keep a state or have a batching rule of their own"
        )


def check_gradient_independence(engine: GradSampler, inputs: Tensor, targets: Tensor, rounding: float) -> None:
    """Refuse a backward pass in which a replaced example changes another's gradient.

    Args:
        engine: whose gradients of single examples are right for two of them.
        inputs: at least four examples (B, K, …).
        targets: (B, …).
        rounding: of a gradient, relative.

    Raises:
        ValueError: naming the parameters.
    """
    engine = engine.twin(engine.model, engine.loss_fn, engine.precision)  # what NaN does to it must not last
    values = {name: p.detach() for name, p in engine.model.named_parameters() if p.requires_grad}
    where = places(len(inputs))
    found: list[Gradients] = []
    before = Snapshot(engine.model)
    for new in [None, *replacements(inputs)][::3]:  # as they are, noise of size 1e4, and NaN; or other tokens
        changed = inputs.clone()
        if new is not None:
            changed[where] = new
        try:
            per_sample = engine.sample_at(values, changed, targets)
        except Exception:
            if new is None:
                raise
            continue  # what the model does not accept cannot enter it
        finally:
            before.restore()  # an iteration of the layer's own, as in spectral norm
        weights = torch.ones(len(inputs), dtype=per_sample.norms.dtype, device=inputs.device)
        weights[where] = 0.0
        sums = {name: torch.zeros_like(p, dtype=weights.dtype) for name, p in values.items()}
        per_sample.add_weighted_sum(sums, weights)
        found.append(sums)
        length = torch.stack([g.norm() for g in found[0].values()]).norm()
        wrong = [n for n, g in sums.items() if not (g - found[0][n]).norm() <= rounding * length]
        if wrong:
            raise ValueError(
                f"the backward pass mixes the examples of a batch: replacing one changes the gradients of others for "
                f"{', '.join(wrong[:3])}, so that no clip bounds what an example does: take out what scales or rounds "
                "gradients over the batch (a hook, a custom backward)"
            )


def _tested(engine: GradSampler, inputs: Tensor, targets: Tensor) -> tuple[GradSampler, Pair, list[Gradients]]:
    """Choose float64 copy or model, and two examples with finite gradients; return them and the gradients."""
    problem: Exception | None = None
    exact = float64_copy(engine.model)
    own = engine.twin(engine.model, engine.loss_fn)
    for tested in [own] if exact is None else [engine.twin(exact, loss_in_float64(engine.loss_fn)), own]:
        for pair in _pairs(tested, inputs, targets):
            try:
                references = _ordinary(tested, pair)
            except Exception as error:  # code that wants float32, a value that a model does not take
                if _raised_here(error):
                    raise
                problem = error
                continue
            if all(bool(g.isfinite().all()) for gradients in references for g in gradients.values()):
                return tested, pair, references
    if problem is None:
        raise ValueError(
            "the gradients of single examples are not finite, on noise as on the data, so nothing can be validated: "
            "check the model's initialization and the range of its inputs"
        )
    raise ValueError(_unsampled(engine, inputs, problem)) from problem


def _pairs(engine: GradSampler, inputs: Tensor, targets: Tensor) -> list[Pair]:
    """Two examples each time: noise, real ones where they differ, or tokens."""
    two = torch.arange(2, device=inputs.device) % len(inputs)
    if len(inputs) > 2 and not differ(inputs[:2]):
        unlike = (inputs != inputs[:1]).flatten(1).any(1)
        two = torch.tensor([0, int(unlike.nonzero()[0])] if bool(unlike.any()) else [0, 1], device=inputs.device)
    exact = next(engine.model.parameters()).dtype == torch.float64
    found = trials(engine.model, inputs[two], 2, noise_first=True)
    return [(in_float64(x) if exact else x, targets[two]) for x in found]


def _loss(engine: GradSampler, views: Tensor, target: Tensor) -> Tensor:
    """Compute the loss of one example, (K, …) and its target, alone."""
    with engine.autocast():
        loss: Tensor = engine.loss_fn(engine.forward({}, views), target.expand(len(views), *target.shape))
    return loss.reshape(())


def _ordinary(engine: GradSampler, pair: Pair) -> list[Gradients]:
    """Compute the gradients of single examples by ordinary backward passes."""
    parameters = {name: p for name, p in engine.model.named_parameters() if p.requires_grad}
    rows, unused = [], set(parameters)
    for views, target in zip(*pair, strict=True):
        with torch.enable_grad():
            loss = _loss(engine, views, target)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        unused &= {name for name, g in zip(parameters, gradients, strict=True) if g is None}
        rows.append(
            {
                n: torch.zeros_like(p) if g is None else g
                for (n, p), g in zip(parameters.items(), gradients, strict=True)
            }
        )
    if unused:
        named = [name for name in parameters if name in unused]
        more = f" and {len(named) - 5} more" if len(named) > 5 else ""
        raise ValueError(
            f"the loss does not depend on {', '.join(named[:5])}{more}, so only noise would move them: freeze "
            "them with requires_grad_(False) or remove them from the model"
        )
    return rows


def _sample(engine: GradSampler, pair: Pair) -> PerSampleGradients:
    """Take the engine's gradients, once it is clear what needs vmap."""
    values = {name: p.detach() for name, p in engine.model.named_parameters() if p.requires_grad}
    try:
        _fit_bare(engine, pair[0][:, 0])
        return engine.sample_at(values, *pair)
    except Exception as error:  # an operation that has no gradient of single examples
        if _raised_here(error):
            raise
        raise ValueError(_unsampled(engine, pair[0], error)) from error


def _raised_here(error: Exception) -> bool:
    """Tell a refusal of this package, a sentence for the user, from an error inside of a model."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return isinstance(error, ValueError) and name.startswith("dpopt.")


def _unsampled(engine: GradSampler, inputs: Tensor, error: Exception) -> str:
    """Write the message about an error inside of the model.

    It must not repeat tokens, which are data.
    """
    line = (str(error).splitlines() or [""])[0][:160]
    reason = f"{type(error).__name__}: {line}" if inputs.is_floating_point() else type(error).__name__
    loop = "" if engine.policy == "loop" else "set engine=loop, or "
    return (
        f"no gradients of single examples can be taken of the model ({type(engine.model).__name__}; {reason}): {loop}"
        "replace the layer that raises"
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
    tolerance = 1e-3 if _tolerance(engine) < 0.1 else 1e-2  # the comparison of gradients decides
    for rows, *singles in zip(*map(output_tensors, (together, *alone)), strict=True):
        if any(x.ndim == 0 for x in singles):
            return False
        expected = torch.cat(singles)
        if rows.shape != expected.shape or not bool((rows - expected).abs().max() <= tolerance * expected.abs().max()):
            return False
    return True


def _compare(engine: GradSampler, pair: Pair, references: list[Gradients], per_sample: PerSampleGradients) -> None:
    """Refuse gradients that differ by more than rounding explains."""
    wrong = _wrong(references, per_sample, _tolerance(engine))
    if wrong and _tolerance(engine) < (rounding := 30 * _rounding(engine, pair, references)):
        wrong = _wrong(references, per_sample, min(rounding, 0.03))
    if wrong:
        named = ", ".join(wrong[:3])
        raise ValueError(
            f"the gradient of {named} under torch.func.vmap is not the one of an ordinary backward pass (an operation "
            "with a custom batching rule, or one that changes what others see): replace the layer"
            if engine.policy in ("vmap", "loop")
            else f"the per-layer gradient of {named} is not the one of an ordinary backward pass (a layer's parameters "
            "are used outside of it, its input has the examples not in the first dimension, or it mixes them): use "
            "engine=vmap or engine=loop"
        )


def _wrong(references: list[Gradients], per_sample: PerSampleGradients, relative: float) -> list[str]:
    """Names of parameters whose gradients differ; a comparison with what is not finite fails."""
    for i, gradients in enumerate(references):
        dtype, device = per_sample.norms.dtype, per_sample.norms.device
        sums = {n: torch.zeros_like(g, dtype=dtype) for n, g in gradients.items()}
        per_sample.add_weighted_sum(sums, torch.eye(len(references), dtype=dtype, device=device)[i])
        length = torch.stack([g.double().norm() for g in gradients.values()]).norm()
        errors = {name: (sums[name] - g).double().norm() for name, g in gradients.items()}
        wrong = [n for n, e in errors.items() if not e <= relative * (gradients[n].double().norm() + length / 30)]
        if not wrong and not abs(per_sample.norms[i] - length) <= relative / 2 * length:
            wrong = ["the norm"]
        if wrong:
            return wrong
    return []


def _rounding(engine: GradSampler, pair: Pair, references: list[Gradients]) -> float:
    """Relative difference of one gradient, alone and in company: where a copy in float64 computes in float32."""
    parameters = {name: p for name, p in engine.model.named_parameters() if p.requires_grad}
    inputs, targets = pair
    views = inputs.shape[1]
    with torch.enable_grad():
        outputs = engine.forward({}, inputs.flatten(0, 1))
        mine = map_tensors(lambda x: x[:views] if x.ndim else x, outputs)
        loss = engine.loss_fn(mine, targets[0].expand(views, *targets[0].shape))
    found = torch.autograd.grad(loss.reshape(()), list(parameters.values()), materialize_grads=True)
    length = torch.stack([g.double().norm() for g in references[0].values()]).norm()
    errors = [(g - references[0][n]).double().norm() for n, g in zip(parameters, found, strict=True)]
    return float(torch.stack(errors).norm() / length.clamp(min=1e-30))


def _tolerance(engine: GradSampler) -> float:
    """Relative difference of two gradients that rounding may make.

    In fp32 it turns a ReLU here and there on or off, which is worth up to half a percent of a gradient; structural
    mistakes are worth a multiple of that.
    """
    return {8: 1e-6, 4: 0.03}.get(min(p.element_size() for p in engine.model.parameters()), 0.3)
