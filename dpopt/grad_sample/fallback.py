"""Per-sample gradients without a rule: of one layer or of the whole model, by vmap or in a loop over examples."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vjp, vmap
from torch.utils._pytree import TreeSpec, tree_unflatten

from dpopt.grad_sample.losses import LossFn
from dpopt.grad_sample.nested import output_tensors
from dpopt.grad_sample.norms import Gradients


@contextmanager
def without_inference_kernels() -> Iterator[None]:
    """Keep attention from its inference kernels, which have no derivative that vmap knows."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def call_module(module: nn.Module, tensors: Gradients, arguments: tuple[Any, ...], keywords: Any = None) -> Any:
    """Call a module with other parameters; changes to its buffers are discarded.

    Args:
        module: the module.
        tensors: parameters by the names of `named_parameters`; wherever else they are tied to, they are replaced too.
        arguments: positional.
        keywords: by name.
    """
    by_id: dict[int, Tensor] = {id(buffer): buffer.clone() for buffer in module.buffers()}
    by_id |= {id(p): tensors[name] for name, p in module.named_parameters() if name in tensors}
    # Every place once: functional_call does not restore a module that it finds under two names.
    places = {
        f"{prefix}.{name}" if prefix else name: by_id[id(x)]
        for prefix, part in module.named_modules()
        for name, x in (*part._parameters.items(), *part._buffers.items())
        if id(x) in by_id
    }
    return functional_call(module, places, arguments, keywords, tie_weights=False)


class LayerFunction:
    """One layer as a function of its trainable parameters, for one example.

    Args:
        module: the layer.
        structure: of its positional and keyword arguments.
        output: which of its output tensors is meant.
    """

    def __init__(self, module: nn.Module, structure: TreeSpec, output: int) -> None:
        self.module, self.structure, self.output = module, structure, output
        self.values = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}

    def __call__(self, values: Gradients, *leaves: Any) -> Tensor:
        """Call the layer."""
        arguments, keywords = tree_unflatten(list(leaves), self.structure)
        return output_tensors(call_module(self.module, values, arguments, keywords))[self.output]

    def gradients(
        self, leaves: tuple[Any, ...], divided: tuple[bool, ...], g: Tensor, looped: bool
    ) -> tuple[Gradients, Tensor]:
        """Gradients (B, *shape) and outputs (B, …), one example at a time or all under vmap.

        Args:
            leaves: arguments, (B, …) where they are divided among examples.
            divided: which are.
            g: gradient of the output, (B, …).
            looped: in a loop instead of vmap.
        """
        with without_inference_kernels():
            if looped:
                return self._in_a_loop(leaves, divided, g)

            def pulled(g: Tensor, *leaves: Any) -> tuple[Gradients, Tensor]:
                result = vjp(lambda values: self(values, *leaves), self.values)
                return result[1](g)[0], result[0]

            dims = (0, *(0 if one else None for one in divided))
            result: tuple[Gradients, Tensor] = vmap(pulled, in_dims=dims)(g, *leaves)
            return result

    def _in_a_loop(self, leaves: tuple[Any, ...], divided: tuple[bool, ...], g: Tensor) -> tuple[Gradients, Tensor]:
        rows, outputs = [], []
        values = {name: value.detach().requires_grad_() for name, value in self.values.items()}
        for i in range(len(g)):
            with torch.enable_grad():
                output = self(values, *(x[i] if one else x for x, one in zip(leaves, divided, strict=True)))
            outputs.append(output.detach())
            rows.append(_gradient(output, values, g[i]))
        return {name: torch.stack([row[name] for row in rows]) for name in values}, torch.stack(outputs)


def _gradient(output: Tensor, values: Gradients, g: Tensor | None = None) -> Gradients:
    if not output.requires_grad:
        return {name: torch.zeros_like(value) for name, value in values.items()}
    found = torch.autograd.grad(output, list(values.values()), g, materialize_grads=True)
    return dict(zip(values, found, strict=True))


def is_plain(x: Any) -> bool:
    """Whether an argument holds no tensor of the batch out of sight."""
    return x is None or isinstance(x, Tensor | bool | int | float | str | torch.dtype | torch.device)


def per_example_gradients(
    model: nn.Module,
    loss_fn: LossFn,
    inputs: Tensor,
    targets: Tensor,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    values: Gradients | None = None,
) -> tuple[Gradients, Tensor]:
    """Gradients (examples, *parameter shape) of the trainable parameters, by name, and losses (examples,).

    Args:
        model: called on the K views of one example at a time, (K, …).
        loss_fn: mean loss over the views.
        inputs: (examples, K, …).
        targets: (examples, …).
        autocast: context of forward and backward.
        values: the trainable parameters, by name, where they are not the model's own.
    """
    trainable = values or {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    constant = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}

    def loss(values: dict[str, Tensor], views: Tensor, target: Tensor) -> Tensor:
        outputs = call_module(model, {**constant, **values}, (views,))
        return loss_fn(outputs, target.expand(len(views), *target.shape))

    with autocast(), without_inference_kernels():
        return vmap(grad_and_value(loss), in_dims=(None, 0, 0))(trainable, inputs, targets)


def looped_gradients(
    model: nn.Module,
    loss_fn: LossFn,
    inputs: Tensor,
    targets: Tensor,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    values: Gradients | None = None,
) -> tuple[Gradients, Tensor]:
    """Take what `per_example_gradients` takes by an ordinary backward pass per example; any model can."""
    # The model's own parameters where they hold the values: a checkpointed layer reads them again in the backward pass.
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    used: Gradients = {
        name: own[name] if own[name].data_ptr() == value.data_ptr() else value.detach().requires_grad_()
        for name, value in (values or own).items()
    }
    other = {name: value for name, value in used.items() if value is not own[name]}
    found, losses = [], []
    for views, target in zip(inputs, targets, strict=True):
        with torch.enable_grad(), autocast():
            outputs = call_module(model, other, (views,))
            loss = loss_fn(outputs, target.expand(len(views), *target.shape))
        losses.append(loss.detach())
        found.append(_gradient(loss, used))
    return {name: torch.stack([one[name] for one in found]) for name in used}, torch.stack(losses)


def fails_alone(error: Exception, inputs: Tensor) -> ValueError:
    """Return what to raise for a model that fails on one example.

    Tokens are data, and an error may repeat one: with tokens, the message omits the error's text.
    """
    message = (str(error).strip().splitlines() or [""])[0][:200] if inputs.is_floating_point() else ""
    return ValueError(
        f"the model or its loss fails on a single example ({type(error).__name__}{message and f': {message}'}): mend "
        "what an ordinary forward and backward pass of it shows"
    )
