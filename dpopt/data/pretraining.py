"""Refuses a private run on records that the initial weights were trained on: ε would not cover them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpopt.data.datasets import DataSpec, looks_like_imagenet
from dpopt.models.pretrained import UNSTATED, weights_origin

_WORDNET = re.compile(r"n\d{8}")  # ImageNet's class folders, those of its subsets too


def check_pretraining(spec: DataSpec, model: Mapping[str, Any], classes: Sequence[str] = ()) -> None:
    """Check that the initial weights were not trained on the dataset.

    Args:
        spec: the dataset; a `collection` of None goes by the dataset's name and class folders.
        model: the model's arguments, defaults included.
        classes: names of the class folders, where there are any.

    Raises:
        ValueError: naming both, and what to set.
    """
    origin = weights_origin(model)
    if not origin:
        return
    collection = spec.collection
    if collection is None:
        named = [name for name in classes if _WORDNET.fullmatch(str(name))]
        alike = looks_like_imagenet(spec.name) or len(named) > len(classes) / 2
        collection = "imagenet" if alike else spec.name
    if origin == UNSTATED:
        raise ValueError(
            "nothing says what the initial weights were trained on, so ε might cover less than it seems to: name the "
            "collections in model.pretrained_on, or set model.pretrained_on=unknown, which the privacy card repeats"
        )
    shared = _names(collection) & _names(origin)
    if not shared and not (looks_like_imagenet(origin) and looks_like_imagenet(collection)):
        return
    what = "images" if len(spec.shape) == 3 else "records"
    images = "dataset.is_imagenet=false, or " if looks_like_imagenet(origin) else ""
    which = collection if "," in origin and shared else origin
    raise ValueError(
        f"the initial weights were trained on {which}, whose {what} {spec.name} holds, "
        "so ε would not cover what they know of them: train from random weights (model.pretrained=false "
        f"model.weights=null), or, if these are not its {what}, state it with {images}collection='' in the DataSpec"
    )


def same_records(one: DataSpec, other: DataSpec) -> bool:
    """Tell by names and collections whether two datasets may hold the same records; features count as their images."""
    first, second = sorted((one.name.lower().replace("-", "_"), other.name.lower().replace("-", "_")), key=len)
    both_imagenet = all(looks_like_imagenet(spec.collection or spec.name) for spec in (one, other))
    shared = _names(one.collection or "") & _names(other.collection or "")
    return first == second or second.startswith(f"{first}_") or both_imagenet or bool(shared)


def _names(collections: str) -> set[str]:
    """Split names at commas; keep their letters and digits."""
    return {word for name in collections.split(",") if (word := re.sub(r"[^a-z0-9]", "", name.lower()))}
