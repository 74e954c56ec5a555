"""Optimizers that torch lacks. Each is an ordinary `torch.optim.Optimizer` that reads `p.grad` and knows no privacy."""

from dpopt.optim.adam_bc import AdamBC
from dpopt.optim.adam_mini import AdamMini
from dpopt.optim.averaged_sgd import AveragedSGD
from dpopt.optim.lamb import LAMB
from dpopt.optim.mada import MADA
from dpopt.optim.microadam import MicroAdam
from dpopt.optim.noise_normalized import NoiseNormalizedSGD
from dpopt.optim.scale_then_privatize import AdamSTP, MicroAdamSTP
from dpopt.optim.sign_sgd import SignSGD
from dpopt.optim.sofim import FedSOFIM

__all__ = [
    "LAMB",
    "MADA",
    "AdamBC",
    "AdamMini",
    "AdamSTP",
    "AveragedSGD",
    "FedSOFIM",
    "MicroAdam",
    "MicroAdamSTP",
    "NoiseNormalizedSGD",
    "SignSGD",
]
