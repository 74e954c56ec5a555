"""dpopt: memory-frugal optimizers under differential privacy.

The names below load when first used, so that `import dpopt` (and with it `run.py --help`) does not import torch.

    plan      = dpopt.PrivacyPlan.calibrate(epsilon=8, delta=1e-5, dataset_size=50_000, batch_size=4096, steps=2000)
    private   = dpopt.PrivateGradient(model, loss_fn, plan, clip=dpopt.clipping.Flat(1.0))
    optimizer = dpopt.optim.MicroAdam(model.parameters(), lr=1e-3)
    for batch in dpopt.poisson_batches(dataset, plan):
        private.backward(batch)     # p.grad now holds the privatized mean
        optimizer.step()
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpopt import data, filters, models, optim
    from dpopt.grad_sample.repair import fix
    from dpopt.optim import schedules
    from dpopt.privacy import clipping, mechanisms
    from dpopt.privacy.audit import audit
    from dpopt.privacy.canaries import Canaries
    from dpopt.privacy.plan import PrivacyPlan
    from dpopt.privacy.private_gradient import PrivateGradient
    from dpopt.privacy.sampling import poisson_batches
    from dpopt.runs.own_card import card
    from dpopt.training.finished import load

__version__ = "0.1.0"
__all__ = ["PrivacyPlan", "PrivateGradient", "clipping", "data", "filters", "load", "mechanisms", "models", "optim"]
__all__ += ["Canaries", "audit", "card", "fix", "poisson_batches", "schedules"]

_HOME = {
    "PrivacyPlan": "dpopt.privacy.plan:PrivacyPlan",
    "PrivateGradient": "dpopt.privacy.private_gradient:PrivateGradient",
    "Canaries": "dpopt.privacy.canaries:Canaries",
    "audit": "dpopt.privacy.audit:audit",
    "card": "dpopt.runs.own_card:card",
    "fix": "dpopt.grad_sample.repair:fix",
    "poisson_batches": "dpopt.privacy.sampling:poisson_batches",
    "load": "dpopt.training.finished:load",
    "clipping": "dpopt.privacy.clipping",
    "data": "dpopt.data",
    "filters": "dpopt.filters",
    "mechanisms": "dpopt.privacy.mechanisms",
    "models": "dpopt.models",
    "optim": "dpopt.optim",
    "schedules": "dpopt.optim.schedules",
    "tracking": "dpopt.runs.tracking",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'dpopt' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    value = import_module(module)
    return getattr(value, attribute) if attribute else value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
