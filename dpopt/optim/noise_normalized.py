"""SGD with momentum at a noise-normalized learning rate, its momentum in few bits.

Where the noise is most of the gradient, Adam's √v̂ is nearly the same in every coordinate: the standard deviation s of
the noise, which is public and needs no storage. With it in the place of √v̂ the step is

    m ← β·m + (1 − β)·g,   m̂ = m/(1 − βᵗ)
    θ ← θ(1 − lr·weight_decay) − lr·m̂/s

that of DP-SGD with momentum whose learning rate is divided by s = σS/(qN). One rate then serves every ε, C and batch
where the noise is most of the gradient. Where the signal is far above it the step grows with it, and may diverge,
as on the transformer of experiments/momentum.yaml; `AdamMini` does not have that weakness. The momentum is kept in 4
bits by default, rounded stochastically, with a range for every `bucket` values: 4/8 + 4/256 bytes of state per
parameter. This is our own combination.
"""

from typing import Any

from torch import Tensor

from dpopt.optim.base import BELOW_ONE, PerTensorOptimizer, check_options
from dpopt.optim.few_bits import check_bits, no_momentum, read_momentum, write_momentum


class NoiseNormalizedSGD(PerTensorOptimizer):
    """Momentum in few bits, over the standard deviation of the noise.

    Args:
        params: parameters or parameter groups.
        lr: learning rate in units of the noise: a coordinate of noise alone moves by about lr·√((1 − β)/(1 + β)).
        momentum: β.
        bits: of a stored value: 4 or 8, or 32 for none of it quantized.
        bucket: values that share a range, a multiple of 4.
        dense_size: tensors of up to so many values keep 32 bits.
        weight_decay: decoupled.
        noise_std: standard deviation of the noise in each coordinate of the gradient. It must be known before a step:
            `PrivateGradient.update_param_groups` writes it.

    Raises:
        ValueError: for an option outside its range, or a step without noise.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.9,
        bits: int = 4,
        bucket: int = 256,
        dense_size: int = 1024,
        weight_decay: float = 0.0,
        noise_std: float | None = None,
    ) -> None:
        check_options(lr=(lr, 0, 1e6), momentum=(momentum, 0, BELOW_ONE), weight_decay=(weight_decay, 0, 1e6))
        check_bits(bits, bucket)
        options = dict(bits=bits, bucket=bucket, dense_size=dense_size, weight_decay=weight_decay, noise_std=noise_std)
        super().__init__(params, dict(lr=lr, momentum=momentum, **options))

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not group["noise_std"]:
            raise ValueError(
                "NoiseNormalizedSGD divides by the standard deviation of the noise, and there is none or it is not "
                "known: call private.update_param_groups(optimizer) after private.backward(batch), and choose another "
                "optimizer for training without noise"
            )
        if not state:
            state.update(step=0, number=len(self.state), **no_momentum(g, group))
        state["step"] += 1
        m = read_momentum(p, state).lerp_(g, 1 - group["momentum"])
        write_momentum(m, state)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(m, alpha=group["lr"] / (group["noise_std"] * (1 - group["momentum"] ** state["step"])))

    def first_moment(self, p: Tensor) -> Tensor:
        """Copy m, in the shape of the parameter."""
        return read_momentum(p, self.state[p]).clone()
