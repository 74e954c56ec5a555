"""MicroAdam (Modoranu et al., 2405.15593); on privatized gradients it is DP-MicroAdam (2511.20509).

With g the gradient, e the error feedback, and a window of the last m sparse gradients (I, V), a step t = 1, 2, … is

    a = g + Q⁻¹(e)                                accumulate
    (I, V) = TopK(|a|)                            select, into row t mod m of the window
    e = Q(a, without V at I)                      keep the rest for later
    m̂ = (1 − β₁)/(1 − β₁ᵗ) · Σ β₁^age V          first moment, over the window
    v̂ = (1 − β₂)/(1 − β₂ᵗ) · Σ β₂^age V²         second moment, over the window
    θ ← θ(1 − lr·weight_decay) − lr·m̂/(ε + √v̂)

A coordinate outside the window has m̂ = 0 and does not move. TopK takes k = ⌈density·4096⌉ of every block of 4,096
values, Q stores 4 bits per value with a range per bucket of 256 values (`quantize.py`), and the window holds 16-bit
positions and bfloat16 values: at density 1% and m = 10 that is 0.5 + 0.016 + 0.4 = 0.916 bytes per parameter, where
Adam has 8. What bfloat16 cuts off a selected value goes back into e, where there is one.

`bits=32, scope="tensor"` is the algorithm as 2511.20509 runs it (TopK over each tensor, nothing rounded), and with
`density=1, window=None` it is Adam. Differences from public code: a last, shorter block selects as many values as a
full one; and tensors of at most `dense_size` values (biases, norms, small layers) keep Adam's two moments, which takes
less memory than their window would and is a fraction of a percent of a model (docs/microadam.md has the figures).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dpopt.optim.base import check_origin, keep_dtypes
from dpopt.optim.microadam.dispatch import choose
from dpopt.optim.microadam.packing import Layout, PackedState, layout
from dpopt.optim.microadam.reference import microadam_step, read_feedback, topk_positions, window_moments

_FORM = ("density", "window", "bits", "bucket", "scope", "error_feedback", "dense_size")  # what shapes the state


class MicroAdam(torch.optim.Optimizer):
    """Adam over a sliding window of sparse gradients with error feedback in few bits.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the denominator.
        weight_decay: decoupled.
        density: fraction of the values selected in a step, in (0, 1].
        window: number of past sparse gradients that the moments see; None for all of them, in two dense moments.
        bits: of the error feedback, 2, 4, 8, or 32 for unquantized feedback and window values.
        bucket: values that share a quantization range, a multiple of 8. Beyond 4,096 the blocks grow with it.
        rounding: of the error feedback, `nearest` or `stochastic` (unbiased).
        error_feedback: carry what was not selected over to later steps; off, it is dropped.
        scope: select from every `block` of 4,096 values, or from the whole `tensor`.
        dense_size: tensors of at most this many values keep Adam's dense moments.
        kernels: `triton`, `c`, `torch`, or `auto` for Triton where parameters lie on a GPU and C on a CPU.

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        density: float = 0.01,
        window: int | None = 10,
        bits: int = 4,
        bucket: int = 256,
        rounding: str = "nearest",
        error_feedback: bool = True,
        scope: str = "block",
        dense_size: int = 1024,
        kernels: str = "auto",
    ) -> None:
        self.kernels = kernels
        self._packed: dict[int, list[PackedState]] = {}
        self._signatures: dict[int, Any] = {}  # of the last step: what need not be looked at again
        defaults = dict(
            lr=lr,
            betas=tuple(betas),
            eps=eps,
            weight_decay=weight_decay,
            density=density,
            window=window,
            bits=bits,
            bucket=bucket,
            rounding=rounding,
            error_feedback=error_feedback,
            scope=scope,
            dense_size=dense_size,
        )
        if kernels not in ("auto", *_STEPS):
            raise ValueError(f"kernels={kernels} must be auto, {', '.join(_STEPS)}")
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; raises ValueError for one outside its range."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step on every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Nothing in there gains from being traced, and much of it cannot be; a decorator would import the compiler.
        (torch.compiler.disable(self._update) if torch.compiler.is_compiling() else self._update)()
        return loss

    def _update(self) -> None:
        for number, group in enumerate(self.param_groups):
            parameters = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            if any(p.grad.is_sparse or p.is_complex() for p in parameters):
                raise ValueError("MicroAdam takes dense, real gradients: use torch.optim.SparseAdam or Adam for others")
            packed_states = [t for t in self._packed_of(number, group, parameters) if t.layout.device.type != "meta"]
            steps = [_STEPS[choose(packed, self.kernels)] for packed in packed_states]
            active = {}
            for parameter in parameters:
                self.state[parameter]["step"] += 1
                active[parameter] = self.state[parameter]["step"]
            for packed, step in zip(packed_states, steps, strict=True):
                _step_packed(packed, {p: t for p, t in active.items() if p in packed.first}, group, step)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_origin(self, state_dict)
        super().load_state_dict(state_dict)
        keep_dtypes(self, state_dict)
        self._packed.clear()  # the next step makes them of this state

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "kernels": self.kernels}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._packed, self._signatures = {}, {}
        super().__setstate__(state)

    @torch.no_grad()
    def step_metrics(self) -> Callable[[], dict[str, float]]:
        """Look at one step from outside, off the hot path: call before the step, and the returned function after it.

        Returns:
            A function of no arguments that gives `optimizer/error_feedback_norm`, ‖Q⁻¹(e)‖ after the step;
            `optimizer/contraction`, √(1 − k/d), the largest part of a that selection can leave behind, and
            `optimizer/left_behind`, the part that it did leave; `optimizer/quantization_omega`, the error of Q relative
            to what it stored; and `optimizer/window_mass`, the part of v̂'s weights that the window holds. Over the
            parameters with error feedback; the theory of 2405.15593 asks (1 + ω)·√(1 − k/d) < 1.
        """
        before = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.numel() > 0 and layout(p, group).feedback:
                    before[p] = self.feedback(p)
                    before[p].view(-1)[: p.numel()] += p.grad.flatten()

        def after() -> dict[str, float]:
            sizes = {"a": 0.0, "rest": 0.0, "error": 0.0, "feedback": 0.0}
            selected = values = 0
            windows = []
            for p, a in before.items():
                form, feedback = self._layout(p), self.feedback(p)
                rest = a.scatter(1, topk_positions(a, form.k), 0.0)
                for name, part in {"a": a, "rest": rest, "error": rest - feedback, "feedback": feedback}.items():
                    sizes[name] += float(part.double().square().sum())
                selected, values = selected + len(a) * form.k, values + a.numel()
                if form.window is not None:
                    windows.append((self.state[p]["step"], form.window))
            mass = 1.0
            if windows:
                (step, window), beta = max(windows), self.param_groups[0]["betas"][1]
                mass = (1 - beta ** min(step, window)) / (1 - beta**step)
            return {
                "optimizer/error_feedback_norm": sizes["feedback"] ** 0.5,
                "optimizer/contraction": (1 - selected / max(values, 1)) ** 0.5,
                "optimizer/left_behind": (sizes["rest"] / max(sizes["a"], 1e-300)) ** 0.5,
                "optimizer/quantization_omega": (sizes["error"] / max(sizes["rest"], 1e-300)) ** 0.5,
                "optimizer/window_mass": mass,
            }

        return after

    @torch.no_grad()
    def feedback(self, parameter: Tensor) -> Tensor:
        """Read the error feedback of a parameter, as the next step will.

        It comes in blocks (n, size), padded with zeros.
        """
        form = self._layout(parameter)
        out = torch.empty(-(-parameter.numel() // form.size), form.size, dtype=form.dtype, device=form.device)
        read_feedback(self.state.get(parameter, {}), out).view(-1)[parameter.numel() :] = 0
        return out

    @torch.no_grad()
    def first_moment(self, parameter: Tensor) -> Tensor:
        """m̂ of a parameter, dense, (d,), after at least one step."""
        state, betas = self.state[parameter], self._group(parameter)["betas"]
        if "exp_avg" in state:
            return (state["exp_avg"] / (1 - betas[0] ** state["step"])).flatten()[: parameter.numel()]
        return self._window_moments(parameter)[0]

    @torch.no_grad()
    def second_moment(self, parameter: Tensor) -> Tensor:
        """v of a parameter, dense, (d,), without bias correction, after at least one step; 0 outside the window."""
        state, betas = self.state[parameter], self._group(parameter)["betas"]
        if "exp_avg_sq" in state:
            return state["exp_avg_sq"].flatten()[: parameter.numel()]
        return self._window_moments(parameter)[1] * (1 - betas[1] ** state["step"])

    def _window_moments(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """m̂ and v̂ over the window, (d,)."""
        state, betas, form = self.state[parameter], self._group(parameter)["betas"], self._layout(parameter)
        indices = state["indices"].flatten(1).long()
        moments = torch.empty(2, len(indices), form.size, dtype=form.dtype, device=form.device)
        m, v = window_moments(indices, state["values"], state["step"], betas, moments)
        return m.flatten()[: parameter.numel()], v.flatten()[: parameter.numel()]

    def _group(self, parameter: Tensor) -> dict[str, Any]:
        return next(g for g in self.param_groups if any(p is parameter for p in g["params"]))

    def _layout(self, parameter: Tensor) -> Layout:
        return layout(parameter, self._group(parameter))

    def _packed_of(self, number: int, group: dict[str, Any], parameters: list[Tensor]) -> list[PackedState]:
        """Return the group's packed states, rebuilt from `state` when parameters change."""
        options = [group[name] for name in _FORM]
        signature = (*options, [(id(p), p.dtype, p.device, p.numel(), bool(self.state.get(p))) for p in parameters])
        packed_states = self._packed.get(number, [])
        if packed_states and signature == self._signatures.get(number):
            return packed_states
        home = {p: packed for packed in packed_states for p in packed.first}
        fitting = [
            p in home
            and home[p].layout == layout(p, group)
            and all(len(rows) == home[p].count(p) for rows in self.state[p].values() if isinstance(rows, Tensor))
            and bool(self.state[p])
            for p in parameters
        ]
        if not all(fitting):
            packed_states = self._pack(group, parameters)
        self._packed[number], self._signatures[number] = packed_states, signature
        return packed_states

    def _pack(self, group: dict[str, Any], parameters: list[Tensor]) -> list[PackedState]:
        members: dict[Layout, list[Tensor]] = {}
        for p in group["params"]:
            if self.state.get(p) or any(p is q for q in parameters):
                members.setdefault(layout(p, group), []).append(p)
        packed_states = [PackedState.of(form, together) for form, together in members.items()]
        for packed in packed_states:
            for p in packed.first:
                old, new = self.state.get(p) or {}, packed.rows(p)
                if old and not _fits(new, old):
                    raise ValueError(
                        f"the state of a parameter does not fit: {', '.join(_FORM)} must stay as they were"
                    )
                for name, rows in new.items() if old else ():
                    rows.copy_(old[name])
                self.state[p] = {"step": old.get("step", 0), **new}
        return packed_states


def _fits(rows: dict[str, Tensor], state: dict[str, Any]) -> bool:
    return {n: t.shape for n, t in rows.items()} == {n: t.shape for n, t in state.items() if n != "step"}


def _step_packed(
    packed: PackedState, active: dict[Tensor, int], group: dict[str, Any], step: Callable[..., None]
) -> None:
    """One step on the active parameters of a packed state."""
    # Copies where parameter or gradient is not contiguous; the parameter's is written back at the end.
    flat = {p: (p.detach().contiguous(), p.grad.contiguous()) for p in active if p.grad is not None}
    step(packed, active, flat, group)
    for p, (values, _) in flat.items():
        if not p.is_contiguous():
            p.copy_(values.view(p.shape))


def _triton_step(
    packed: PackedState, active: dict[Tensor, int], flat: dict[Tensor, tuple[Tensor, Tensor]], group: dict[str, Any]
) -> None:
    from dpopt.optim.microadam.triton_kernels import step_packed

    with torch.cuda.device_of(next(iter(packed.tensors.values()))):  # Triton launches on the current device
        for step in set(active.values()):
            step_packed(packed, {p: flat[p] for p in active if active[p] == step}, step, group)


def _c_step(
    packed: PackedState, active: dict[Tensor, int], flat: dict[Tensor, tuple[Tensor, Tensor]], group: dict[str, Any]
) -> None:
    from dpopt.optim.microadam.cpu import step_packed

    for step in set(active.values()):
        step_packed(packed, {p: flat[p] for p in active if active[p] == step}, step, group)


def _reference_step(
    packed: PackedState, active: dict[Tensor, int], flat: dict[Tensor, tuple[Tensor, Tensor]], group: dict[str, Any]
) -> None:
    form, lr, decay = packed.layout, float(group["lr"]), float(group["weight_decay"])
    flat = {p: (values.view(-1), gradient.view(-1)) for p, (values, gradient) in flat.items()}
    for step, spans in packed.runs(active):
        start, stop = spans[0].row, spans[-1].row + spans[-1].rows
        state = {name: tensor[start:stop] for name, tensor in packed.tensors.items()}
        scratch = packed.scratch(stop - start)
        blocks = read_feedback(state, scratch[0]).view(-1)
        places = [((s.row - start) * form.size, s.end - s.begin) for s in spans]
        for (offset, count), span in zip(places, spans, strict=True):
            blocks[offset : offset + count].add_(flat[span.parameter][1][span.begin : span.end])
            blocks[offset + count : offset + span.rows * form.size] = 0
        rows = None
        if group["rounding"] == "stochastic":
            rows = torch.cat([torch.arange(s.rows, device=form.device) + s.begin // form.size for s in spans])
        update = microadam_step(scratch, state, step, form.k, group["betas"], group["eps"], lr, rows).view(-1)
        for (offset, count), span in zip(places, spans, strict=True):
            values = flat[span.parameter][0][span.begin : span.end]
            if decay:
                values.mul_(1 - lr * decay)
            values.add_(update[offset : offset + count])


_STEPS = {"triton": _triton_step, "c": _c_step, "torch": _reference_step}


def _check(options: dict[str, Any]) -> None:
    """Raise ValueError for an option outside its range."""
    betas, window, bits = options["betas"], options["window"], options["bits"]
    ranges = {
        "lr": (options["lr"] >= 0, "0 or more"),
        "betas": (all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)"),
        "eps": (options["eps"] > 0, "positive"),
        "weight_decay": (options["weight_decay"] >= 0, "0 or more"),
        "density": (0 < options["density"] <= 1, "in (0, 1]"),
        "window": (window is None or window >= 1, "at least 1, or None for an unbounded window"),
        "bits": (bits in (2, 4, 8, 32), "2, 4, 8 or 32"),
        "bucket": (options["bucket"] >= 8 and options["bucket"] % 8 == 0, "a positive multiple of 8"),
        "rounding": (options["rounding"] in ("nearest", "stochastic"), "nearest or stochastic"),
        "scope": (options["scope"] in ("block", "tensor"), "block or tensor"),
        "dense_size": (options["dense_size"] >= 0, "0 or more"),
    }
    for name, (good, meaning) in ranges.items():
        if not good:
            raise ValueError(f"{name}={options[name]} must be {meaning}")
