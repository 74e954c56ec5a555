"""The privacy card of a training loop of one's own, of what its objects know and what its author states."""

from pathlib import Path
from typing import Any, TypedDict, Unpack

from dpopt.data.fingerprint import FingerprintKey, Kind, home
from dpopt.data.sources import as_source, records_of
from dpopt.privacy.plan import PrivacyPlan
from dpopt.privacy.private_gradient import PrivateGradient
from dpopt.runs.description import RunDescription
from dpopt.runs.ledger import describe_total, spending
from dpopt.runs.origin import NOT_STATED, code_rows, data_row, weights_row
from dpopt.runs.privacy_card import CardFacts, privacy_card, write_card
from dpopt.runs.provenance import git_commit

_UNHASHED = "not hashed: `data=` was not given"


class Stated(TypedDict, total=False):
    """What only the author of a training can say.

    Attributes:
        name: of the training; its dataset and model by default.
        dataset: name of the dataset.
        model: name of the model; its class by default.
        optimizer: name of the optimizer, which ε does not depend on.
        unit: what a record is: one photo, one ticket, all records of a user.
        initial_weights: where they are from, and what they were trained on.
        preprocessing: constants that inputs are normalized by, and where these are from.
    """

    name: str
    dataset: str
    model: str
    optimizer: str
    unit: str
    initial_weights: str
    preprocessing: str


def card(
    plan: PrivacyPlan,
    private: PrivateGradient,
    folder: str | Path | None = None,
    data: Any = None,
    weights: str | Path | None = None,
    **stated: Unpack[Stated],
) -> str:
    """Write the privacy card of a training that `private` has taken the steps of.

    Steps, clip rule, noise and randomness are read from `plan` and `private`. What nobody states is named so.

    Args:
        plan: of the training.
        private: took its steps.
        folder: where privacy_card.md and privacy_card.html are written; None writes no file.
        data: what `poisson_batches` was given; names the dataset by a MAC and finds it in the ledger.
        weights: file of the trained weights, which is hashed.
        stated: see `Stated`.

    Returns:
        The card, as Markdown.

    Raises:
        ValueError: for a training that took no step, or one under another plan; FileNotFoundError without weights.
    """
    if unknown := set(stated) - set(Stated.__annotations__):
        raise ValueError(f"a card states no {', '.join(sorted(unknown))}: it takes {', '.join(Stated.__annotations__)}")
    if not isinstance(private, PrivateGradient) or (private.plan is not plan and private.plan != plan):
        raise ValueError(
            "the plan alone does not show that its noise was added: pass the PrivateGradient that was made with this "
            "plan and has taken the steps"
        )
    if not private.step:
        raise ValueError("no step was taken, so there is nothing to state: write the card when the training has ended")
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"{weights} is missing: save the weights before the card, or leave weights= out")
    about = _describe(private, stated)
    facts = CardFacts(
        stated.get("unit", f"one item of the data; what that is, is {NOT_STATED}"),
        {
            "initial weights": stated.get("initial_weights", NOT_STATED),
            "preprocessing": stated.get("preprocessing", f"{NOT_STATED}; constants of the training data are outside ε"),
        },
        code_rows(git_commit())
        | _data_rows(private, data, about)
        | weights_row("weights", None if weights is None else Path(weights)),
    )
    sensitivity = None if private.clip is None else float(private.clip.sensitivity)
    text = privacy_card(about, private.plan, sensitivity, private.step, private.diagnostics, facts)
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_card(Path(folder), text, about.name)
    return text


def _describe(private: PrivateGradient, stated: Stated) -> RunDescription:
    model, clip = stated.get("model", type(private.model).__name__), private.clip
    dataset = stated.get("dataset", NOT_STATED)
    target = f"{type(clip).__module__}.{type(clip).__qualname__}"
    mechanism = private.plan.mechanism.to_dict(private.plan.steps)
    return RunDescription(
        name=stated.get("name", f"{model} on {stated['dataset']}" if "dataset" in stated else model),
        private=clip is not None,
        dataset=dataset,
        model=model,
        optimizer=stated.get("optimizer", f"an optimizer that is {NOT_STATED}"),
        optimizer_call="",
        clip=type(clip).__name__,
        clip_target=target,
        others=(),
        mechanism_call=", ".join(f"{key} {value}" for key, value in mechanism.items() if key != "coefficients"),
        filter_call="",
        schedule_call="",
        takes=private.takes,
        ema=None,
        views=1,
        holdout=0.0,
        diagnostics=private.diagnostics,
        precision=private.engine.precision,
        compiled=False,
        seed=None,
        secret=private.plan.key.secure,
        dry_run=False,
        own_loop=True,
    )


def _kind(secret: bool) -> Kind:
    return "quick" if secret else "content"  # as runs do


def _data_rows(private: PrivateGradient, data: Any, about: RunDescription) -> dict[str, str]:
    """Name the data, and what the ledger says of them; this training is added to it."""
    if data is None:
        return {"training data": _UNHASHED, "ledger of who trained": "not read, because the data were not hashed"}
    key = FingerprintKey.load()
    source, kind = as_source(data), _kind(private.plan.key.secure)
    rows, mac = data_row(key.mac(source.fingerprint(kind)), key.key_id), key.mac(records_of(source, kind))
    if private.clip is not None and private.plan.noise_multiplier:
        names = {"run": "", "name": about.name, "dataset": about.dataset, "data": mac, "key_id": key.key_id}
        run = spending(private.plan, private.step, "finished", **names)
        rows |= {"ledger of who trained": describe_total(home(), run, counted=False)}
    return rows
