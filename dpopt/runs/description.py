"""How panel and card name a run: the names of its components, and the settings next to the plan."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RunDescription:
    """Names and settings of a run, for people.

    Attributes:
        name: of the run.
        private: False for the non-private control.
        dataset: name of the dataset.
        model: name of the model.
        optimizer: name of the optimizer.
        optimizer_call: the optimizer with its learning rate and what is not a default.
        clip: name of the clip rule.
        clip_target: the clip rule's import path.
        others: names of components that are not the standard ones.
        mechanism_call: the mechanism of the noise with what is not a default.
        filter_call: the filter with what is not a default; empty for none.
        schedule_call: the schedule likewise; empty for a constant rate.
        takes: what the estimator takes of each example: gradients, losses, features, or updates (of clients).
        ema: decay of the weight average, None for none.
        views: augmented views per example.
        holdout: fraction of the training set that is not trained on.
        diagnostics: whether raw statistics of private data are recorded, those on the hold-out among them.
        precision: `fp32`, `bf16` or `fp64`.
        compiled: whether gradients are compiled.
        seed: of the configuration; None for one that is not known.
        secret: whether draws are keyed by the operating system.
        dry_run: whether only the plan is printed.
        own_loop: whether somebody's own loop trained, not `dpopt train`.
        max_length: tokens of the longest text; None for other data.
    """

    name: str
    private: bool
    dataset: str
    model: str
    optimizer: str
    optimizer_call: str
    clip: str
    clip_target: str
    others: tuple[str, ...]
    mechanism_call: str
    filter_call: str
    schedule_call: str
    takes: str
    ema: float | None
    views: int
    holdout: float
    diagnostics: bool
    precision: str
    compiled: bool
    seed: int | None
    secret: bool
    dry_run: bool
    own_loop: bool = False
    max_length: int | None = None
