"""Refuses a private run on images that the initial weights were trained on: ε would not cover them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpopt.data.datasets import DataSpec, looks_like_imagenet
from dpopt.models.pretrained import weights_origin

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
        collection = "imagenet" if alike else ""
    both = looks_like_imagenet(origin) and looks_like_imagenet(collection)
    if not both and origin.lower() != collection.lower():
        return
    raise ValueError(
        f"the initial weights were trained on {origin}, whose images {spec.name} holds, so ε would not cover what they "
        "know of them: train from random weights (model.pretrained=false model.weights=null), or, if these are not its "
        "images, state it with dataset.is_imagenet=false (collection='' in a DataSpec)"
    )
