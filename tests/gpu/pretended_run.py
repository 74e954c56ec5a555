"""Train on a pretended GPU; write what every step made a real one wait for: python pretended_run.py OUT ARGUMENTS."""

import json
import sys
from pathlib import Path

import torch
from gpu import pretended

pretended.pretend()
torch.set_num_threads(1)


class Launches:
    """In place of a Triton kernel: counts its launches."""

    def __init__(self, watch):
        self.watch = watch

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.watch.launched(arguments)

        return launch


def _pulled_back(g, w, gain, how):
    """∂/∂w and ∂/∂gain of ∂/∂(standardized weight), filters in rows."""
    w = w - w.mean(-1, keepdim=True)
    square = w.square().sum(-1)
    floor, extra, factor = how
    length = (square.clamp(min=floor) + extra).sqrt()
    direction, gain = w / length[:, None], 1.0 if gain is None else gain.inner
    along = (g * direction).sum(-1)
    rest = g - g.mean(-1, keepdim=True) - ((square > floor) * along)[..., None] * direction
    return (factor * gain / length)[:, None] * rest, factor * along


def stand_in(watch):
    """Put functions that compute on the CPU in place of what launches the kernels of per-example gradients."""
    import dpopt.grad_sample.choices as choices
    import dpopt.grad_sample.triton_kernels as kernels

    def weighted_sum(rows, weights):
        watch.launched(rows, weights)
        present = weights.inner != 0
        return pretended.OnGPU(torch.mv(rows.inner.double()[present].T, weights.inner[present].double()))

    def square_norms(rows):
        watch.launched(rows, times=2)  # the second adds what the programs of a row have found
        return pretended.OnGPU(rows.inner.double().square().sum(1))

    def standardized_square_norms(parts, weight, gain, how, counted):
        watch.launched(parts, weight, times=2)
        g, w = (t.inner.double().movedim(-3, -2).flatten(-2) for t in (parts, weight))
        of_weight, of_gain = _pulled_back(g, w, gain, how)
        squares = (counted[0] * of_weight.square().sum(2) + counted[1] * of_gain.square()).sum(1)
        return pretended.OnGPU(squares), pretended.OnGPU(squares.clone())  # as of examples that it is not blind to

    def standardized_gradients(gradient, weight, gain, how):
        watch.launched(gradient, gradient, weight)
        found = _pulled_back(gradient.inner.double(), weight.inner.double(), gain, how)
        return tuple(pretended.OnGPU(x.to(gradient.dtype)) for x in found)

    def conv_weight_gradient(a, g, kernel, stride, dilation, corner, groups):
        found = []
        for x, y in zip(a.inner, g.inner, strict=True):
            x = torch.nn.functional.pad(x, (corner[1], kernel[1] * dilation[1], corner[0], kernel[0] * dilation[0]))
            rows, columns = (
                (n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(y.shape[2:], stride, dilation, kernel, strict=True)
            )
            shape = (y.shape[1], x.shape[1] // groups, *kernel)
            x = x[:, :, :rows, :columns]
            found.append(torch.nn.grad.conv2d_weight(x, shape, y, stride, 0, dilation, groups))
        found = pretended.OnGPU(torch.stack(found))
        watch.launched(a, g, found)
        return found

    def group_norm_gradients(x, g, groups, eps):
        watch.launched(x, g)
        normal = torch.nn.functional.group_norm(x.inner.float(), groups, eps=eps)
        return tuple(pretended.OnGPU(t.sum(2)) for t in (normal * g.inner, g.inner.float()))

    for kernel in (
        *(weighted_sum, square_norms, standardized_square_norms, standardized_gradients),
        *(conv_weight_gradient, group_norm_gradients),
    ):
        setattr(kernels, kernel.__name__, kernel)
    choices._measure = lambda device, ways: next(iter(ways))  # nothing can be timed


def main(out, *arguments):
    """Train, and write one record per step."""
    from helpers import configure

    import dpopt.optim.microadam.triton_kernels as microadam
    import dpopt.privacy.noise_triton as noise
    from dpopt.training.run import run
    from dpopt.training.trainer import Trainer

    watch, steps, train_step = pretended.Watch(), [], Trainer.train_step

    stand_in(watch)
    noise._noise_kernel = microadam._step_kernel = microadam._dense_kernel = Launches(watch)

    def counted(self, batch):
        watch.forget()
        measured = train_step(self, batch)
        events = [[kind, place, times] for (kind, place), times in watch.events.items()]
        pieces = -(-len(batch.indices) // self.components.micro_batch)
        counts = {"operations": watch.operations, "bytes": watch.bytes, "examples": len(batch.indices)}
        steps.append({"events": events, "micro_batches": max(1, pieces), **counts})
        return measured

    Trainer.train_step = counted
    with watch:
        result = run(configure(*arguments))
    Path(out).write_text(json.dumps({"status": result["status"], "steps": steps}))


if __name__ == "__main__":
    main(*sys.argv[1:])
