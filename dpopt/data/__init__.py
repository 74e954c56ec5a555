"""Datasets by name, and the sources that batches are read from."""

from dpopt.data.datasets import (
    DataSpec,
    cifar10,
    cifar10_scattering,
    cifar10_squeezenet,
    cifar100,
    digits,
    fashion_mnist,
    imagenet,
)

__all__ = [
    "DataSpec",
    "cifar10",
    "cifar10_scattering",
    "cifar10_squeezenet",
    "cifar100",
    "digits",
    "fashion_mnist",
    "imagenet",
]
