"""The typed root of the configuration: every key that `run.py` accepts, with its default and its checks.

This module imports no torch, so that `--help`, `--cfg job` and TAB completion answer at once.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from dpopt.privacy.accounting import ACCOUNTANTS, check_budget

COMPONENTS = ("dataset", "model", "optimizer", "clipping", "estimator", "mechanism", "filter", "schedule", "logger")
_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel holds conf/ inside the package; in a checkout dpopt/conf is a link to it, which an archive may have lost.
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
_INDEPENDENT = "dpopt.mechanisms.Gaussian"
_CANARIES = 10_000  # of audit=true
_RENAMED = {"engine": {"gram": "ghost"}}  # values of earlier versions, still accepted
_CHOICES = {
    "precision": ("fp32", "bf16", "fp64"),
    "accountant": ACCOUNTANTS,
    "randomness": ("secret", "research"),
    "ledger": ("on", "off"),
    "holdout_by": ("content", "position"),
    "engine": ("auto", "store", "recompute", "ghost", "vmap", "loop"),
}


@dataclass
class Config:
    """The root of the configuration. Component groups are Python calls: `_target_` plus arguments."""

    # Components. Each is a group: `optimizer=dp_adam` is conf/optimizer/dp_adam.yaml, `optimizer.lr=1e-3` its argument.
    dataset: dict[str, Any] = field(default_factory=dict)  # the training and test data
    model: dict[str, Any] = field(default_factory=dict)  # the network
    optimizer: dict[str, Any] = field(default_factory=dict)  # applied to the privatized gradient
    clipping: dict[str, Any] = field(default_factory=dict)  # the clip rule of per-sample gradients
    estimator: dict[str, Any] = field(default_factory=lambda: {"_target_": "dpopt.PrivateGradient"})  # of gradients
    mechanism: dict[str, Any] = field(default_factory=lambda: {"_target_": _INDEPENDENT})  # of noise, and its sampler
    filter: dict[str, Any] = field(default_factory=dict)  # between the private gradient and the optimizer
    schedule: dict[str, Any] = field(default_factory=dict)  # of the learning rate
    logger: dict[str, Any] = field(default_factory=dict)  # wandb, tensorboard, or csv for metrics.csv alone
    # The budget. Exactly two of epsilon, noise_multiplier, and steps or epochs; the third follows.
    private: bool = True  # false only through privacy=none: no clipping and no noise
    epsilon: Optional[float] = None  # noqa: UP045 (ε of the whole run; inf clips without noise)
    noise_multiplier: Optional[float] = None  # noqa: UP045 (σ, the noise over the clip rule's sensitivity)
    steps: Optional[int] = None  # noqa: UP045 (optimizer steps)
    epochs: Optional[float] = None  # noqa: UP045 (optimizer steps, in passes over the data)
    delta: float = 1e-5  # δ; below 1/N to mean anything
    accountant: str = "pld"  # computes ε: pld (tightest), rdp or prv
    clip_norm: float = 1.0  # C, what every example's gradient is clipped to
    randomness: str = "secret"  # key of all draws: secret, of the operating system; research, of the seed: no claim
    ledger: str = "on"  # on: add what a private run spends to the user's ledger (dpopt ledger); off
    allow_large_delta: bool = False  # accept δ ≥ 1/N, which permits publishing an example outright
    # Training. Together with the components and the budget this is what makes a run.
    batch_size: int = 4096  # expected; the realized size is Poisson
    views: int = 1  # K, augmented views per example, whose gradients are averaged before the clip
    holdout: float = 0.0  # fraction of the training set that is not trained on
    holdout_by: str = "content"  # content: a coin per example; position: a fixed number, as papers split
    ema: Optional[float] = None  # noqa: UP045 (decay of the weight average that is evaluated and exported)
    precision: str = "fp32"  # fp32, bf16 (autocast) or fp64
    seed: int = 0  # of splits, weights, sampling and noise
    tag: str = ""  # label that separates otherwise identical runs
    # Running. None of these changes a result, except that eval_every and audit draw other noise.
    eval_every: int = 50  # steps between evaluations on the test set
    checkpoint_every: int = 50  # steps between checkpoints; at most so many are lost
    time_limit: Optional[float] = None  # noqa: UP045 (seconds, after which the run stops with a result, to be continued)
    diagnostics: bool = False  # record raw statistics of private data, outside ε
    audit: Any = 0  # canaries that audit a private run (true: 10,000); the model stays as it is
    dry_run: bool = False  # print the plan, train nothing
    fresh: bool = False  # retrain a finished run
    data_dir: str = "data"  # where datasets lie, or are downloaded to; by default the environment's DPOPT_DATA_DIR
    output_dir: str = "runs"  # where run directories are made
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …
    workers: int = 2  # data-loading processes, for image folders
    micro_batch: Any = "auto"  # examples whose gradients are held at once; auto: what fits into memory
    memory: Optional[float] = None  # noqa: UP045 (GB for auto; a quarter of the machine's, or half of the GPU's)
    engine: str = "auto"  # per-sample gradients: auto, store, recompute, ghost, vmap or loop
    compile: bool = False  # forward, backward and per-sample gradients as one compiled graph

    @classmethod
    def from_stored(cls, values: Mapping[str, Any]) -> "Config":
        """Read a configuration that an earlier version may have stored."""
        return cls(**renamed_keys(values))

    def __post_init__(self) -> None:
        for name, renamed in _RENAMED.items():
            setattr(self, name, renamed.get(getattr(self, name), getattr(self, name)))
        if isinstance(self.audit, bool):
            self.audit = _CANARIES if self.audit else 0
        self._check_budget()
        self._check_choices()
        self._check_numbers()

    def _check_budget(self) -> None:
        if self.private:
            check_budget(self.epsilon, self.noise_multiplier, self.steps, self.epochs)
            return
        if self.epsilon is not None or self.noise_multiplier is not None:
            raise ValueError(
                "privacy=none trains without privacy, so epsilon and noise_multiplier have no meaning: drop them, "
                "or choose a budget with privacy=eps8 (epsilon=inf clips without noise)"
            )
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("privacy=none needs the number of steps: set steps, or set steps=null and epochs")

    def _check_choices(self) -> None:
        if self.micro_batch != "auto" and not (isinstance(self.micro_batch, int) and self.micro_batch >= 1):
            raise ValueError(f"micro_batch={self.micro_batch} must be at least 1, or auto for what fits into memory")
        if not isinstance(self.audit, int) or not (self.audit == 0 or self.audit >= 16):
            raise ValueError(f"audit={self.audit} must be true, false or a number of canaries, at least 16")
        if self.audit and not self.private:
            raise ValueError("privacy=none claims nothing that could be audited: drop audit, or choose privacy=eps8")
        if self.audit and self.mechanism.get("_target_") != _INDEPENDENT:
            raise ValueError(
                "audit scores noise that is independent from step to step: drop audit, or choose mechanism=gaussian"
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)} must be one of {', '.join(choices)}")

    def _check_numbers(self) -> None:
        """Refuse numbers outside their range. None is accepted where a key is optional."""
        ranges = {
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "views": (self.views >= 1, "at least 1"),
            "eval_every": (self.eval_every >= 1, "at least 1"),
            "checkpoint_every": (self.checkpoint_every >= 1, "at least 1"),
            "memory": (self.memory is None or self.memory > 0, "a positive number of GB, or null"),
            "steps": (self.steps is None or 0 < self.steps < math.inf, "positive"),
            "epochs": (self.epochs is None or 0 < self.epochs < math.inf, "positive"),
            "holdout": (0 <= self.holdout < 1, "a fraction in [0, 1)"),
            "ema": (self.ema is None or 0 <= self.ema < 1, "a decay in [0, 1), or null for no weight average"),
            "clip_norm": (0 < self.clip_norm < math.inf, "a positive number"),
            "seed": (self.seed >= 0, "0 or more"),
            "time_limit": (self.time_limit is None or self.time_limit >= 0, "0 or more seconds, or null for none"),
            "workers": (self.workers >= 0, "0 or more"),
        }
        for name, (good, meaning) in ranges.items():
            if not good:
                raise ValueError(f"{name}={getattr(self, name)} must be {meaning}")


def renamed_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rename keys of earlier versions: `secure_rng` said whether randomness is secret."""
    kept = {key: value for key, value in values.items() if key != "secure_rng"}
    if "secure_rng" in values:
        kept["randomness"] = "secret" if values["secure_rng"] else "research"
    return kept
