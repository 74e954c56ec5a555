"""Training, test and held-out examples of a run: loaded, checked, fingerprinted and split."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dpopt.config.components import estimator_takes
from dpopt.config.schema import Config
from dpopt.data.clients import ClientSource
from dpopt.data.datasets import DataSpec
from dpopt.data.fingerprint import Kind
from dpopt.data.holdout import check_holdout, split_holdout
from dpopt.data.sources import Source, TensorSource, as_source, records_of
from dpopt.privacy.statistics import check_channels
from dpopt.runs.identity import is_secret
from dpopt.training.initial_weights import check_fingerprint, check_initial_weights


@dataclass(frozen=True)
class Data:
    """Training, test and held-out examples.

    Attributes:
        train: what is trained on.
        test: what is evaluated on.
        held_out: the examples split off from the training set; None for none.
        fingerprint: of the training set, of its settings and of the split, for the run's own noise.
        records: fingerprint of the whole training set alone, under which the ledger adds up runs. Both are never
            written down but as a MAC.
        classes: their names, of the DataSpec or of class folders; empty for none.
    """

    train: Source
    test: Source
    held_out: Source | None
    fingerprint: str
    records: str
    classes: Sequence[str]


def load_data(config: Config, spec: DataSpec, device: torch.device) -> Data:
    """Load, check and fingerprint training and test data; split off the hold-out.

    Raises:
        ValueError: when the examples are not what was announced or cannot be trained on; OSError for unreadable files.
    """
    loaded = spec.load(Path(config.data_dir).expanduser(), device, config.workers)
    if not isinstance(loaded, tuple | list) or len(loaded) != 2:
        raise ValueError(f"the load function of {spec.name} must return a pair (train, test)")
    train, test = (as_source(part, device, config.workers) for part in loaded)
    classes = getattr(getattr(train, "dataset", None), "classes", ())
    if config.private:
        check_initial_weights(config, spec, classes)
    if isinstance(train, ClientSource) != (estimator_takes(config) == "updates"):
        raise ValueError("dataset=clients and estimator=federated go together: choose both, or neither")
    for part, source in (("training", train), ("test", test)):
        if not len(source):
            raise ValueError(f"{spec.name} has no {part} examples: give it at least one")
    if len(train) != spec.train_size:
        raise ValueError(
            f"{spec.name} has {len(train):,} training examples, not {spec.train_size:,} as announced: correct "
            "train_size in the DataSpec"
        )
    train, test = train.check(spec.expected, "training"), test.check(spec.expected, "test")
    if spec.statistics:
        check_channels(train)
    if config.private and config.holdout:
        check_holdout(spec, config.holdout_by)
    # Without a secret key only the content keeps the noise of two runs on neighboring datasets apart.
    kind: Kind = "quick" if is_secret(config) else "content"
    train = replace(train, origin=train.records()) if isinstance(train, TensorSource) else train  # hashed once
    records = records_of(train, kind)
    alike = len(train) == len(test) and records == records_of(test, kind)
    if config.private and alike and records_of(train, "content") == records_of(test, "content"):
        raise ValueError(
            f"the training set of {spec.name} is its test set, too, so test metrics would give it away without noise: "
            "return other examples to test on"
        )
    train, held_out = split_holdout(train, config.holdout, config.seed, config.holdout_by)
    fingerprint = train.fingerprint(kind)
    if config.private:
        check_fingerprint(config, {records, fingerprint})
    return Data(train, test, held_out, fingerprint, records, spec.class_names or classes)
