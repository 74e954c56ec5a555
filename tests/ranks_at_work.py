"""What a rank does in a test: the steps of small private problems, and wrong versions of the library to catch."""

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import ROOT, make_plan, small_data, small_model
from torch import nn

import dpopt
from dpopt import ranks
from dpopt.data.sources import TensorSource
from dpopt.filters import Kalman
from dpopt.privacy import agreement, noise, private_gradient
from dpopt.privacy.least_squares import LeastSquares
from dpopt.privacy.private_gradient import PrivateGradient
from dpopt.privacy.raw_statistics import RawStatistics
from dpopt.privacy.zeroth_order import ZerothOrder
from dpopt.ranks import WHOLE, Share


def images(size=64):
    """Pictures that are shifted and mirrored."""
    draws = torch.Generator().manual_seed(2)
    inputs = torch.randint(0, 256, (size, 3, 6, 6), dtype=torch.uint8, generator=draws)
    targets = torch.randint(0, 3, (size,), generator=draws)
    return TensorSource(inputs, targets, (0.5,) * 3, (0.5,) * 3, crop=2, flip=True)


def picture_model(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)).to(dtype)


def fixed_scale(parameter):
    """A scale that follows nothing, so that rounding cannot grow."""
    return 0.5 + torch.linspace(0, 1, parameter.numel(), dtype=parameter.dtype).view(parameter.shape)


class Problem:
    """A private problem, and a step on it that records what matters.

    Args:
        kind: which seam it uses.
        dtype: of the model. In float64 the optimizer moves the parameters, in float32 they drift alike everywhere.
    """

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        batch = {"empty": 1, "small": 2, "least squares": 64}.get(kind, 16)
        steps = 1 if kind == "least squares" else 12 if kind == "empty" else 4
        plan = make_plan(size=64, batch=batch, steps=steps)
        clip, options, make = dpopt.clipping.Flat(0.5), {}, PrivateGradient
        self.data = images() if kind == "views" else small_data(dtype=dtype)
        self.views, self.filter = (4 if kind == "views" else 1), None
        self.model = picture_model(dtype) if kind == "views" else small_model(dtype)
        if kind == "least squares":
            self.model = nn.Linear(5, 3).to(dtype)
            nn.init.zeros_(self.model.weight), nn.init.zeros_(self.model.bias)
            make = LeastSquares
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        if kind == "adaptive":
            clip = dpopt.clipping.Adaptive(0.5, count_noise=3.0)
            plan = dpopt.PrivacyPlan(1.0, 64, 16, steps, 1e-3, count_noise=3.0, key=plan.key)
        if kind == "slack":
            clip = dpopt.clipping.Slack(0.5, coordinates=3)
        if kind == "correlated":
            plan = replace(plan, mechanism=dpopt.mechanisms.BandMF(3))
        if kind == "disk":
            self.filter = Kalman(self.model.parameters())
            options = {"query_points": self.filter.query_points}
        if kind == "scale":
            self.optimizer = dpopt.optim.AdamSTP(self.model.parameters(), lr=0.01)
            options = {"pre_clip_scale": self.optimizer.pre_clip_scale if dtype == torch.float64 else fixed_scale}
        if kind == "zeroth order":
            make = ZerothOrder
        self.plan, self.drifts = plan, dtype == torch.float32
        self.private = make(self.model, F.cross_entropy, plan, clip, diagnostics=True, **options)

    def train(self) -> list[dict]:
        """Take all steps; return what was seen in each."""
        seen, steps = [], []
        self.private._release = lambda total, bound, real=self.private._release: (
            seen.append(total.clone()),
            real(total, bound),
        )
        for batch in dpopt.poisson_batches(self.data, self.plan, views=self.views, micro_batch=2):
            self.private.backward(batch)
            self.private.update_param_groups(self.optimizer)
            if self.filter is not None:
                self.filter.apply()
            gradients = torch.cat([p.grad.flatten() for p in self.model.parameters()])
            steps.append({"indices": batch.indices, "sum": seen[-1], "gradient": gradients.clone()})
            steps[-1]["statistics"] = dict(self.private.statistics)
            info = self.private.step_info
            steps[-1]["clip"] = {name: info[name] for name in ("clip_norm", "clip_rate") if name in info}
            if self.drifts:
                with torch.no_grad():
                    for p in self.model.parameters():
                        p.add_(0.03 * torch.cos(torch.arange(p.numel()).view(p.shape) * 1.0 + batch.step))
            else:
                self.optimizer.step()
        steps[-1]["epsilon"] = self.plan.epsilon_at(self.private.step)
        steps[-1]["cell"] = self.cell()
        return steps

    def cell(self) -> float:
        """One cell of the grid of the release, in units of `p.grad`."""
        private = self.private
        return noise.release_grid(private._std(private._sensitivity())) / self.plan.batch_size


KINDS = (
    *("plain", "empty", "small", "views", "adaptive", "slack", "disk", "scale", "correlated", "zeroth order"),
    "least squares",
)


def steps_of_all_kinds(rank, world):
    """Take the steps of every kind of problem, in both precisions."""
    dtypes = {"float64": torch.float64, "float32": torch.float32}
    return {(kind, name): Problem(kind, dtype).train() for kind in KINDS for name, dtype in dtypes.items()}


def plain_steps(rank, world):
    """Take the steps of one problem whose batches are sometimes smaller than the world."""
    return Problem("small", torch.float64).train()


def augmented_steps(rank, world):
    """Take steps on views that are drawn at random."""
    return Problem("views", torch.float64).train()


def secret_steps(rank, world):
    """Take steps under a secret key of the operating system; return the gradients."""
    model = small_model()
    plan = dpopt.PrivacyPlan.calibrate(epsilon=3, delta=1e-3, dataset_size=64, batch_size=16, steps=2)
    private = PrivateGradient(model, F.cross_entropy, plan, dpopt.clipping.Flat(1.0))
    found = []
    for batch in dpopt.poisson_batches(small_data(), plan, micro_batch=8):
        private.backward(batch)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return torch.cat(found)


def different_ranks(rank, world):
    """Train, one after the other, where the last rank differs in one thing; return the sentences."""
    sentences = {}
    last = rank == world - 1
    for what in ("secret key", "plan", "data", "model", "clip rule"):
        plan = make_plan(seed=int(last and what == "secret key"), sigma=1.5 if last and what == "plan" else 1.0)
        inputs, targets = small_data()
        model = small_model(seed=int(last and what == "model"))
        if last and what == "data":
            inputs = inputs.flip(0)
        clip = dpopt.clipping.Flat(0.9 if last and what == "clip rule" else 1.0)
        private = PrivateGradient(model, F.cross_entropy, plan, clip)
        try:
            private.backward(next(iter(dpopt.poisson_batches((inputs, targets), plan))))
        except ValueError as error:
            sentences[what] = str(error)
    return sentences


def wishes(rank, world):
    """Rank 1 wishes to stop before the second step; return what each step says."""
    problem = Problem("plain", torch.float64)
    found = []
    for batch in dpopt.poisson_batches(problem.data, problem.plan):
        problem.private.wants_to_stop = rank == 1 and batch.step == 1
        problem.private.backward(batch)
        found.append(problem.private.wants_to_stop)
    return found


# Wrong versions of the library, by name; `spawned.at_ranks` applies them in every process.


def noise_before_the_reduction(patch):
    def add_up(self, row, raw):
        noise.add_noise(row[: -RawStatistics.ROOM], self._std(self._sensitivity()), 1.0, self.plan.key, self.step)
        self.wants_to_stop = raw.add_up_ranks(row, self.wants_to_stop)
        return row[: -RawStatistics.ROOM]

    patch.setattr(PrivateGradient, "_add_up_ranks", add_up)
    patch.setattr(private_gradient, "add_noise", lambda total, std, divisor, *_: total.div_(divisor))


def the_same_local_mask(patch):
    patch.setattr(Share, "of", lambda self, rows: rows[:: self.world])


def whole_batches_on_all_ranks(patch):
    patch.setattr(Share, "of", lambda self, rows: rows)


def a_divisor_of_local_counts(patch):
    def backward(self, batch, real=PrivateGradient.backward):
        real(self, batch)
        for p in self.model.parameters():
            p.grad *= self.plan.batch_size / max(1, len(batch.indices))

    patch.setattr(PrivateGradient, "backward", backward)


def averaged_sums(patch):
    patch.setattr(ranks, "add_up", lambda row, real=ranks.add_up: (real(row), row.div_(ranks.share().world)))


def a_rank_that_skips_its_empty_batch(patch):
    def backward(self, batch, real=PrivateGradient.backward):
        if len(batch.indices) or ranks.share().world == 1:
            return real(self, batch)
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        self.step += 1

    patch.setattr(PrivateGradient, "backward", backward)


def a_secret_key_per_rank(patch):
    patch.setattr(ranks, "key_of_first", lambda make: make())
    ranks_that_compare_nothing(patch)


def ranks_that_compare_nothing(patch):
    patch.setattr(private_gradient, "check_agreement", lambda *_: None)


def ranks_that_compare_names_alone(patch):
    patch.setattr(agreement, "module_fingerprint", lambda model: "")


def augmentation_by_place_in_the_share(patch):
    def views(self, requests, key, views, micro_batch, share=WHOLE, real=TensorSource.views):
        return real(self, ((step, share.of(drawn)) for step, drawn in requests), key, views, micro_batch)

    patch.setattr(TensorSource, "views", views)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Whether two sums are equal up to a fraction of their size."""
    return bool((a - b).norm() <= tolerance * max(float(b.norm()), math.sqrt(len(b)) * 1e-3))


def counted_collectives(rank, world):
    """Count the collectives of each step after the first comparison of the ranks."""
    problem = Problem("adaptive", torch.float64)
    counts, calls = [], []
    for name in ("all_reduce", "broadcast", "all_gather", "all_gather_object", "broadcast_object_list", "barrier"):
        real = getattr(dist, name)
        setattr(dist, name, lambda *a, real=real, **o: (calls.append(1), real(*a, **o))[1])
    problem.private._agreed = world
    for batch in dpopt.poisson_batches(problem.data, problem.plan):
        calls.clear()
        problem.private.backward(batch)
        counts.append(len(calls))
    return counts


def refused_models(rank, world):
    """Try models that other libraries distribute; return the sentences."""
    sentences = []
    for wrap in (nn.parallel.DistributedDataParallel, fully_sharded):
        with pytest.raises(ValueError) as error:
            PrivateGradient(wrap(small_model(torch.float32)), F.cross_entropy, make_plan(), dpopt.clipping.Flat(1.0))
        sentences.append(str(error.value))
    return sentences


def fully_sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (ranks.share().world,)))


def documented_loop(rank, world):
    """Follow docs/several_devices.md, in the group that is there; return the weights."""
    text = (ROOT / "docs/several_devices.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    torch.manual_seed(0)
    inputs = torch.randn(1000, 4)
    scope = {"dataset": (inputs, (inputs[:, 0] > 0).long()), "model": nn.Linear(4, 2), "loss_fn": F.cross_entropy}
    assert 'dist.init_process_group("gloo")' in example
    exec(example.replace('dist.init_process_group("gloo")', ""), scope | {"torch": torch, "dpopt": dpopt})
    return scope["model"].weight.detach()
