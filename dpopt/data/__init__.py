"""Datasets by name, and the sources that batches are read from."""

from dpopt.data.clients import clients
from dpopt.data.datasets import (
    ChannelStatistics,
    DataSpec,
    cifar10,
    cifar100,
    digits,
    fashion_mnist,
    imagenet,
    mnist,
)
from dpopt.data.features import cifar10_scattering, cifar10_squeezenet, fashion_mnist_scattering, mnist_scattering
from dpopt.data.procedural import procedural
from dpopt.data.text import agnews, e2e, hub_text, sst2, text_file, trec

__all__ = [
    "ChannelStatistics",
    "DataSpec",
    "agnews",
    "cifar10",
    "cifar10_scattering",
    "cifar10_squeezenet",
    "cifar100",
    "clients",
    "digits",
    "e2e",
    "fashion_mnist",
    "fashion_mnist_scattering",
    "hub_text",
    "imagenet",
    "mnist",
    "mnist_scattering",
    "procedural",
    "sst2",
    "text_file",
    "trec",
]
