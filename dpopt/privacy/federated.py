"""Federated learning with client-level privacy: the unit is a client, whose "gradient" is its local update.

In every round each client takes part independently with probability q. From the weights θ it takes K steps of gradient
descent on all its examples, and returns Δ = θ − θ_K, which is clipped, summed and noised as a gradient is:

    p.grad = (Σ_c clip(Δ_c) + N(0, σ²S²))/(qN),     N = the public number of clients

A server optimizer sees nothing else: SGD at learning rate 1 is FedAvg (McMahan et al., 1710.06963), Adam is FedAdam,
MicroAdam is FedMicroAdam. The dataset must consist of clients: `dataset=clients`. One local step at rate 1 is the mean
gradient of a client, clipped: user-level DP-SGD.
"""

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from dpopt.grad_sample.losses import ExampleWeighted
from dpopt.grad_sample.norms import Gradients
from dpopt.grad_sample.per_sample import PerSampleGradients
from dpopt.privacy.private_gradient import Point, PrivateGradient
from dpopt.privacy.raw_statistics import RawStatistics


class Federated(PrivateGradient):
    """`PrivateGradient` from local updates of clients.

    Args:
        arguments: of `PrivateGradient`. Inputs of a client are (m, …), its targets (m,), below 0 where there is none.
        local_steps: K, steps of gradient descent on all examples of a client.
        local_lr: their learning rate.
        options: of `PrivateGradient`.

    Raises:
        ValueError: for no local step, a learning rate that is not positive, a filter, or class weights.
    """

    takes = "updates"

    def __init__(self, *arguments: Any, local_steps: int = 1, local_lr: float = 0.1, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if local_steps < 1 or not local_lr > 0:
            raise ValueError(f"local_steps={local_steps} must be at least 1 and local_lr={local_lr} positive")
        if self.query_points is not None or isinstance(self.loss_fn, ExampleWeighted):
            raise ValueError("a client's update is taken at the weights themselves, from a loss without class weights")
        self.local_steps, self.local_lr = local_steps, local_lr

    def _validate(self, inputs: Tensor, targets: Tensor, mask: Tensor, trimmed: bool = False) -> None:
        """Validate the model on examples of clients: no forward may keep anything of one client for the next."""
        present = (targets >= 0) & mask[:, None]
        few = slice(0, len(mask))
        super()._validate(inputs.flatten(0, 1)[few, None], targets.flatten().clamp(min=0)[few], present.flatten()[few])

    def _per_sample_gradients(
        self, inputs: Tensor, targets: Tensor, scale: Gradients | None, points: list[Point]
    ) -> PerSampleGradients:
        """Take the updates of clients, each by itself."""
        updates = [self._update(x, y) for x, y in zip(inputs, targets, strict=True)]
        per_sample = PerSampleGradients(len(inputs), scale)
        per_sample.store(None, {name: torch.stack([update[name] for update, _ in updates]) for name in updates[0][0]})
        return per_sample.finish(torch.stack([loss for _, loss in updates]))

    def _update(self, inputs: Tensor, targets: Tensor) -> tuple[Gradients, Tensor]:
        """Return Δ of one client, and its loss before the first step; nothing is written to the model."""
        start = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        own = targets >= 0
        inputs, targets = inputs[own], targets[own]
        local, first = dict(start), torch.zeros((), dtype=next(iter(start.values())).dtype, device=inputs.device)
        for step in range(self.local_steps if len(inputs) else 0):
            moving = {n: p.detach().requires_grad_() for n, p in local.items()}
            with torch.enable_grad(), self.engine.autocast():
                loss = self.loss_fn(functional_call(self.model, {**buffers, **moving}, (inputs,)), targets)
            slopes = torch.autograd.grad(loss, list(moving.values()), materialize_grads=True)
            local = {n: p.detach() - self.local_lr * g for (n, p), g in zip(moving.items(), slopes, strict=True)}
            first = loss.detach() if step == 0 else first
        return {n: start[n] - local[n] for n in start}, first

    def _add_plain(
        self, sums: Gradients, inputs: Tensor, targets: Tensor, points: list[Point], raw: RawStatistics
    ) -> None:
        """Add updates as they are: the non-private control."""
        for x, y in zip(inputs, targets, strict=True):
            update, loss = self._update(x, y)
            for name, total in sums.items():
                total += update[name]
            if self.diagnostics:
                present = torch.ones(1, dtype=torch.bool, device=loss.device)
                raw.add(loss[None], ~present, present, present)
