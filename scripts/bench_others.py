"""The same step by other libraries, for `bench_engine.py`."""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
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


def jax_privacy_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor, autocast: Autocast) -> Callable[[], None]:
    """Make JAX-Privacy's: vmap of the model's graph, rendered in JAX with the same weights, compiled; fp32 alone.

    Raises:
        NotImplementedError: for a layer that `_in_jax` lacks, or another precision.
    """
    import jax
    from jax_privacy import clipped_grad

    if autocast(x.device)._enabled:
        raise NotImplementedError("JAX has no autocast")
    graph = torch.fx.symbolic_trace(model)
    values = {name: jax.numpy.asarray(p.detach().numpy()) for name, p in model.named_parameters()}

    def loss(values: dict[str, Any], views: Any, label: Any) -> Any:
        return -jax.nn.log_softmax(_in_jax(graph, values, views))[:, label].mean()

    gradient = jax.jit(clipped_grad(loss, l2_clip_norm=1.0, batch_argnums=(1, 2), keep_batch_dim=False))
    inputs, labels = jax.numpy.asarray(x.numpy()), jax.numpy.asarray(y.numpy())

    def step() -> None:
        jax.block_until_ready(gradient(values, inputs, labels))

    return step


def _in_jax(graph: torch.fx.GraphModule, values: dict[str, Any], x: Any) -> Any:
    """Run a traced model of convolutions, GroupNorm, pooling and linear layers in JAX: (K, C, H, W) to (K, classes)."""
    import jax
    import jax.numpy as jnp

    def layer(name: str, x: Any) -> Any:
        module = graph.get_submodule(name)
        weight: Any = values.get(f"{name}.weight")
        bias: Any = values.get(f"{name}.bias")
        match module:
            case nn.Conv2d():
                padding = [(int(n), int(n)) for n in module.padding]
                names = ("NCHW", "OIHW", "NCHW")
                y = jax.lax.conv_general_dilated(x, weight, module.stride, padding, dimension_numbers=names)
                return y if bias is None else y + bias[:, None, None]
            case nn.GroupNorm():
                groups = x.reshape(len(x), module.num_groups, -1)
                mean, variance = groups.mean(-1, keepdims=True), groups.var(-1, keepdims=True)
                y = ((groups - mean) / jnp.sqrt(variance + module.eps)).reshape(x.shape)
                return y * weight[:, None, None] + bias[:, None, None]
            case nn.Linear():
                return x @ weight.T + bias
            case nn.MaxPool2d(kernel_size=2) | nn.AdaptiveAvgPool2d(output_size=2) as pool:
                edge = 2 if isinstance(pool, nn.MaxPool2d) else x.shape[2] // 2
                tiles = x.reshape(*x.shape[:2], x.shape[2] // edge, edge, x.shape[3] // edge, edge)
                return tiles.max((3, 5)) if isinstance(pool, nn.MaxPool2d) else tiles.mean((3, 5))
            case nn.ReLU():
                return jax.nn.relu(x)
            case nn.Flatten():
                return x.reshape(len(x), -1)
            case nn.Identity():
                return x
        raise NotImplementedError(f"{type(module).__name__} is not rendered in JAX")

    functions: dict[Any, Callable[..., Any]] = {F.relu: lambda x, **_: jax.nn.relu(x), operator.add: operator.add}
    known: dict[Any, Any] = {}
    for node in graph.graph.nodes:
        inputs: list[Any] = [known.get(n) for n in node.args]
        match node.op:
            case "placeholder":
                known[node] = x
            case "call_module":
                known[node] = layer(node.target, *inputs)
            case "call_method" if node.target == "mean":
                known[node] = inputs[0].mean(node.kwargs["dim"])
            case "call_function" if node.target in functions:
                known[node] = functions[node.target](*inputs)
            case "output":
                return inputs[0]
            case _:
                raise NotImplementedError(f"{node.target} is not rendered in JAX")
    raise AssertionError("a traced model has an output")
