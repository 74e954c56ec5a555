"""Federated learning: against local updates taken one by one with autograd, and what a client may contribute."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import make_plan, small_model
from torch import nn

import dpopt
from dpopt.data.clients import NO_EXAMPLE, ClientSource, clients
from dpopt.data.sources import TensorSource
from dpopt.privacy.federated import Federated

EXACT = dict(rtol=1e-9, atol=1e-12)


def cohort(count=12, most=4, seed=1):
    """Clients of 0 to 4 examples each."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count * most, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 3, (count * most,), generator=generator)
    rows = torch.arange(count * most).view(count, most)
    rows[torch.arange(most)[None] >= (torch.arange(count) % (most + 1))[:, None]] = -1
    return ClientSource(TensorSource(inputs, targets), rows)


def gradient(source, clip=0.3, sigma=0.0, micro_batch=5, model=None, batch=None, **options):
    """The first step's `p.grad`, all clients taking part unless `batch` is smaller, as one vector times qN."""
    model = model or small_model()
    batch = batch or len(source)
    plan = make_plan(sigma=sigma, size=len(source), batch=batch)
    private = Federated(model, F.cross_entropy, plan, dpopt.clipping.Flat(clip), **options)
    private.backward(next(dpopt.poisson_batches(source, plan, micro_batch=micro_batch)))
    return torch.cat([p.grad.flatten() for p in model.parameters()]) * batch


def oracle(source, steps, lr, clip):
    """Σ clip(θ − θ_K), client by client, by torch's SGD on a copy of the model."""
    total = 0.0
    for row in source.clients:
        own, local = row[row >= 0], small_model()
        start = nn.utils.parameters_to_vector(local.parameters()).detach().clone()
        optimizer = torch.optim.SGD(local.parameters(), lr=lr)
        for _ in range(steps if len(own) else 0):
            optimizer.zero_grad()
            F.cross_entropy(local(source.examples.inputs[own]), source.examples.targets[own]).backward()
            optimizer.step()
        update = start - nn.utils.parameters_to_vector(local.parameters()).detach()
        total = total + update * min(1.0, clip / max(float(update.norm()), 1e-300))
    return total


@pytest.mark.parametrize("steps, lr, clip", [(1, 1.0, 0.3), (3, 0.5, 0.3), (3, 0.5, 1e6)])
@pytest.mark.parametrize("micro_batch", [1, 5, 20])
def test_equals_local_training_client_by_client(steps, lr, clip, micro_batch):
    source = cohort()
    found = gradient(source, clip, micro_batch=micro_batch, local_steps=steps, local_lr=lr)
    torch.testing.assert_close(found, oracle(source, steps, lr, clip), **EXACT)


def test_one_step_of_clients_of_one_example_is_dp_sgd():
    source = cohort(most=1, count=16)
    rows = torch.arange(16)[:, None]
    source = ClientSource(source.examples, rows)
    plan, model = make_plan(sigma=0.7, size=16, batch=4), small_model()
    private = dpopt.PrivateGradient(model, F.cross_entropy, plan, dpopt.clipping.Flat(0.3))
    pair = (source.examples.inputs, source.examples.targets)
    private.backward(next(dpopt.poisson_batches(pair, plan)))
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]) * 4
    found = gradient(source, sigma=0.7, batch=4, local_steps=1, local_lr=1.0)
    torch.testing.assert_close(found, expected, **EXACT)  # sample and noise are those of the plan's key, too


def test_a_client_contributes_at_most_c_however_many_examples_and_steps_it_has():
    source = cohort()
    for client in range(len(source)):
        without = ClientSource(source.examples, source.clients.clone())
        without.clients[client] = -1
        options = dict(clip=0.2, local_steps=5, local_lr=10.0)
        difference = (gradient(source, **options) - gradient(without, **options)).norm()
        assert difference <= 0.2 * (1 + 1e-5) and (difference > 0.19) == bool((source.clients[client] >= 0).any())


def test_what_is_not_finite_stays_with_its_client():
    """A client of NaN contributes zero, and reaches no other one: not as padding, either."""
    source = cohort()
    broken = ClientSource(replace_input(source, 4 * 4, float("nan")), source.clients)  # of client 4
    without = ClientSource(source.examples, source.clients.clone())
    without.clients[4] = -1
    torch.testing.assert_close(gradient(broken), gradient(without), **EXACT)
    unused = ClientSource(replace_input(source, 0, float("nan")), source.clients)  # client 0 has no example
    torch.testing.assert_close(gradient(unused), gradient(source), **EXACT)


def replace_input(source, at, value):
    inputs = source.examples.inputs.clone()
    inputs[at] = value
    return TensorSource(inputs, source.examples.targets)


def test_local_steps_leave_the_model_as_it_is():
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    gradient(cohort(), model=model, local_steps=3, local_lr=1.0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_without_privacy_updates_are_averaged():
    source, model = cohort(), small_model()
    plan = make_plan(sigma=0.0, size=12, batch=12)
    private = Federated(model, F.cross_entropy, plan, None, local_steps=2, local_lr=0.5)
    private.backward(next(dpopt.poisson_batches(source, plan, micro_batch=5)))
    found = torch.cat([p.grad.flatten() for p in model.parameters()]) * 12
    torch.testing.assert_close(found, oracle(source, 2, 0.5, 1e30), **EXACT)


@pytest.mark.parametrize("options", [dict(local_steps=0), dict(local_lr=0.0), dict(query_points=lambda: [])])
def test_bad_options(options):
    with pytest.raises(ValueError, match=r"local_steps|class weights"):
        Federated(small_model(), F.cross_entropy, make_plan(), dpopt.clipping.Flat(1.0), **options)


# The partition


def cut(tmp_path, **options):
    spec = clients(of="dpopt.data.digits", **options)
    train, _ = spec.load(tmp_path, torch.device("cpu"), 0)
    assert len(train) == spec.train_size == train.public_size
    return train.check(spec.expected, "training")


def test_a_dirichlet_partition(tmp_path):
    """Disjoint, no larger than announced, a function of the seed; few classes per client where α is small."""
    few, many = (cut(tmp_path, clients=30, per_client=1437, alpha=alpha) for alpha in (0.05, 100.0))
    for source in (few, many):
        taken = source.clients[source.clients >= 0]
        assert len(taken.unique()) == len(taken) == 1437  # each example has one client
    again = cut(tmp_path, clients=30, per_client=1437, alpha=0.05)
    assert torch.equal(few.clients, again.clients) and few.fingerprint() == again.fingerprint()
    assert not torch.equal(few.clients, cut(tmp_path, clients=30, per_client=1437, alpha=0.05, seed=1).clients)

    def classes(source):
        rows = [row[row >= 0] for row in source.clients]
        return sum(len(source.examples.targets[row].unique()) for row in rows) / len(rows)

    assert classes(few) < 4 < 9 < classes(many)
    short = cut(tmp_path, clients=30, per_client=10, alpha=100.0)
    assert short.clients.shape == (30, 10) and torch.equal(short.clients, many.clients[:, :10])


def test_what_a_client_hands_out(tmp_path):
    source = cut(tmp_path, clients=200, per_client=12, alpha=0.3)
    inputs, targets = next(source.views([(0, torch.arange(200))], make_plan().key, 1, 200))
    own = source.clients >= 0
    assert inputs.shape == (200, 12, 1, 8, 8) and targets.shape == (200, 12)
    assert bool((targets[~own] == NO_EXAMPLE).all()) and bool((targets[own] >= 0).all()) and not inputs[~own].any()
    plain = torch.cat([x for x, _ in source.examples.plain(512)])
    assert torch.equal(inputs[own], plain[source.clients[own]])
    assert sum(len(x) for x, _ in source.plain(100)) == int(own.sum())
    half = source.subset(torch.arange(0, 200, 2), 100)
    assert len(half) == half.public_size == 100 and half.fingerprint() != source.fingerprint()
    assert len(set(source.contents())) > 150 and len(source.contents()) == 200


def test_groups_as_clients(monkeypatch, tmp_path):
    users = [f"user{i % 7}" for i in range(60)]
    spec = dpopt.data.DataSpec("mine", 60, 3, (5,), lambda *_: (TensorSource(*rows, groups=users), None))
    rows = torch.randn(60, 5), torch.randint(0, 3, (60,))
    monkeypatch.setattr(dpopt.data, "mine", lambda: spec, raising=False)
    train, _ = clients("dpopt.data.mine", clients=7, per_client=20, alpha=None).load(tmp_path, torch.device("cpu"), 0)
    for row in train.clients:
        assert len({users[i] for i in row[row >= 0]}) == 1
    assert int((train.clients >= 0).sum()) == 60
    with pytest.raises(ValueError, match=r"has 7 groups, not 8: set dataset.clients=7"):
        clients("dpopt.data.mine", clients=8, alpha=None).load(tmp_path, torch.device("cpu"), 0)
    with pytest.raises(ValueError, match="no groups"):
        clients("dpopt.data.digits", clients=8, alpha=None).load(tmp_path, torch.device("cpu"), 0)


# As a run

RUN = (
    "experiment=federated",
    "dataset.clients=40",
    "batch_size=10",
    "steps=2",
    "eval_every=2",
    "allow_large_delta=true",
)


@pytest.mark.parametrize("optimizer", ["dp_sgd", "dp_adam", "dp_microadam", "fed_sofim"])
def test_server_optimizers_and_the_card(command, tmp_path, optimizer):
    done = command("train", *RUN, f"optimizer={optimizer}")
    assert done.returncode == 0, done.stderr
    card = next(tmp_path.glob("runs/*/privacy_card.md")).read_text()
    assert "| privacy unit | one client with all of its examples, at most 8 |" in card
    assert "one client added or removed" in card and "N | 40, taken as public" in card
    assert "Poisson, q = 0.25 (expected batch 10)" in card


@pytest.mark.parametrize("words", [("estimator=gradient",), ("dataset=digits", "batch_size=100")])
def test_clients_and_federated_go_together(command, words):
    own = [w for w in RUN if not (w.startswith("dataset.") and "dataset=digits" in words)]
    if "dataset=digits" in words:
        own = ["experiment=quickstart", "estimator=federated", "steps=2"]
        words = ()
    done = command("train", *own, *words)
    assert done.returncode == 1 and "dataset=clients and estimator=federated go together" in done.stderr
