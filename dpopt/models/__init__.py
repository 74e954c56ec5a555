"""Networks that can be trained under differential privacy: no layer mixes the examples of a batch.

Each is a function of `num_classes` and `in_channels` (and its own arguments) that returns a module.
"""

from dpopt.models.cnn import cnn
from dpopt.models.cnn5 import cnn5
from dpopt.models.deit import deit_base, deit_small, deit_tiny
from dpopt.models.linear import linear
from dpopt.models.nf_resnet import nf_resnet50
from dpopt.models.resnet import resnet18, resnet50
from dpopt.models.squeezenet import squeezenet
from dpopt.models.tanh_cnn import tanh_cnn
from dpopt.models.transformer import transformer
from dpopt.models.vit import vit
from dpopt.models.wrn import wrn_16_4, wrn_40_4

__all__ = [
    "cnn",
    "cnn5",
    "deit_base",
    "deit_small",
    "deit_tiny",
    "linear",
    "nf_resnet50",
    "resnet18",
    "resnet50",
    "squeezenet",
    "tanh_cnn",
    "transformer",
    "vit",
    "wrn_16_4",
    "wrn_40_4",
]
