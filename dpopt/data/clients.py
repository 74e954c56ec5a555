"""Clients: a dataset cut into parts, each of which is sampled, clipped and protected as a whole.

`dataset=clients dataset.of=dpopt.data.cifar10` draws a Dirichlet partition: for every class, the shares of the clients
are drawn from Dirichlet(α), so that a small α gives clients of few classes (Hsu et al., 1909.06335). With
`dataset.alpha=null` the clients are the groups of the source, its users for instance. A client with more than
`per_client` examples keeps as many, chosen by a hash of each; whoever has none takes part with an update of zero.
Examples are not augmented. The test set stays as it is.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpopt.data.datasets import DataSpec, Loaded
from dpopt.data.fingerprint import Kind, combine, row_digests, tensor_digest
from dpopt.data.items import Expected
from dpopt.data.map_source import Request, group_names
from dpopt.data.sources import TensorSource
from dpopt.machine import sent
from dpopt.ranks import WHOLE, Share
from dpopt.rng import RandomKey

NO_EXAMPLE = -100  # as a target; cross_entropy's ignore_index


@dataclass(frozen=True, eq=False)
class ClientSource:
    """A `Source` of clients: the views of a client are its examples, its targets are theirs.

    Attributes:
        examples: of all clients.
        clients: (N, m), numbers of the examples of each client; -1 behind its last.
        announced: the public number of clients; None for the number there is.
        whole: fingerprint of the source that this one is a subset of, and of what was selected.
    """

    examples: TensorSource
    clients: Tensor
    announced: int | None = None
    whole: str = ""

    def __len__(self) -> int:
        return len(self.clients)

    @property
    def public_size(self) -> int:
        """The number of clients that plans are made for."""
        return len(self) if self.announced is None else self.announced

    def views(
        self, requests: Iterable[Request], key: RandomKey, views: int, micro_batch: int, share: Share = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if views != 1:
            raise ValueError(f"views={views} are taken of an example, and a client has many: set views=1")
        for _, drawn in requests:
            for piece in share.of(drawn).split(micro_batch):
                rows = sent(self.clients[piece], self.examples.inputs.device)
                own = rows >= 0
                x = self.examples._finish(self.examples.inputs[rows[own]])
                inputs = x.new_zeros(*rows.shape, *x.shape[1:])
                inputs[own] = x
                yield inputs, self.examples.targets[rows.clamp(min=0)].masked_fill(~own, NO_EXAMPLE)

    def plain(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All examples of all clients, in order."""
        yield from self.examples.subset(self.clients[self.clients >= 0]).plain(batch_size)

    def subset(self, indices: Tensor, public_size: int | None = None) -> "ClientSource":
        whole = combine("subset", self.fingerprint(), tensor_digest(indices))
        return replace(self, clients=self.clients[indices.cpu()], announced=public_size, whole=whole)

    def fingerprint(self, kind: Kind = "content") -> str:
        """Hash every example, also of no client, and who has it."""
        return self.whole or combine("clients", self.examples.fingerprint(kind), tensor_digest(self.clients))

    def contents(self) -> list[bytes]:
        """Hash each client's examples."""
        hashes = self.examples.contents()
        return [combine("client", *sorted(hashes[i] for i in row if i >= 0)).encode() for row in self.clients.tolist()]

    def check(self, expected: Expected, part: str) -> "ClientSource":
        """Check the examples of all clients."""
        return replace(self, examples=self.examples.check(expected, part))


def clients(
    of: str = "dpopt.data.cifar10",
    clients: int = 100,
    per_client: int = 500,
    alpha: float | None = 0.5,
    options: dict[str, Any] | None = None,
    seed: int = 0,
) -> DataSpec:
    """Cut a dataset in memory into clients.

    Args:
        of: a function that returns its DataSpec.
        clients: N, the number of clients, public.
        per_client: m, the most examples of a client.
        alpha: of the Dirichlet distribution of classes; null for the groups of the source as clients.
        options: arguments of `of`.
        seed: of the partition.
    """
    module, _, name = of.rpartition(".")
    base: DataSpec = getattr(import_module(module), name)(**(options or {}))
    if clients < 1 or per_client < 1 or (alpha is not None and not alpha > 0):
        raise ValueError(f"clients={clients}, per_client={per_client} and alpha={alpha} must be positive")
    if base.statistics:
        raise ValueError(
            f"{base.name} releases statistics in which an example is protected, not a client: drop options.statistics"
        )

    def load(data_dir: Path, device: torch.device, workers: int) -> Loaded:
        train, test = base.load(data_dir, device, workers)
        if not isinstance(train, TensorSource):
            raise ValueError(f"{base.name} is not in memory as tensors: dataset=clients cuts a TensorSource")
        owner = _dirichlet(train.targets, clients, alpha, seed) if alpha is not None else _groups(train, clients)
        order = _by_content(train, seed)
        rows = torch.full((clients, per_client), -1)
        for client in range(clients):
            own = order[owner[order] == client][:per_client]
            rows[client, : len(own)] = own
        return ClientSource(train, rows), test

    unit = f"one client with all of its examples, at most {per_client:,}"
    return replace(base, name=f"{base.name}_clients", train_size=clients, load=load, unit=unit)


def _by_content(train: TensorSource, seed: int) -> Tensor:
    """Order examples by a hash of what they are, so that no client decides which examples another one keeps."""
    digests = zip(row_digests(train.inputs), row_digests(train.targets), strict=True)
    names = [combine("clients", str(seed), x, y) for x, y in digests]
    return torch.tensor(sorted(range(len(names)), key=names.__getitem__))


def _dirichlet(targets: Tensor, clients: int, alpha: float, seed: int) -> Tensor:
    """Draw the client of each example: the examples of a class are cut by shares from Dirichlet(α)."""
    key = RandomKey.from_seed(seed, "clients")
    generator, owner = np.random.default_rng(key.seed("shares")), torch.zeros(len(targets), dtype=torch.long)
    order = torch.argsort(key.uniform(len(targets), "classes"))
    for label in targets.unique().cpu():
        members = order[targets.cpu()[order] == label]
        cuts = (np.cumsum(generator.dirichlet(np.full(clients, alpha))) * len(members)).round()
        owner[members] = torch.from_numpy(np.searchsorted(cuts[:-1], np.arange(len(members)), side="right"))
    return owner


def _groups(train: TensorSource, clients: int) -> Tensor:
    """Give each group of a source a number, and each example its group's."""
    if train.groups is None:
        raise ValueError(
            "the dataset names no groups that could be clients: set dataset.alpha for a Dirichlet partition"
        )
    names = group_names(train.groups, len(train))
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    if len(numbers) != clients:
        raise ValueError(
            f"the dataset has {len(numbers):,} groups, not {clients:,}: set dataset.clients={len(numbers)}"
        )
    return torch.tensor([numbers[name] for name in names])
