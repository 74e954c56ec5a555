"""What a model's initial weights come from: needed for the privacy card and for the key of a run's noise.

ε covers what is trained on here, not what the initial weights have learned before. Where the two are the same images,
it covers nothing.
"""

from collections.abc import Mapping
from typing import Any


def weights_origin(node: Mapping[str, Any]) -> str:
    """Name the collection that initial weights were trained on; may be empty.

    Weights of timm and torchvision, and files of weights, count as ImageNet's unless `pretrained_on` names another.

    Args:
        node: the model's arguments, defaults included.
    """
    if not (node.get("pretrained") or node.get("weights")):
        return ""
    return str(node.get("pretrained_on") or "imagenet")


def describe_weights(node: Mapping[str, Any]) -> str:
    """Say where a model's initial weights come from, for the privacy card."""
    origin = weights_origin(node)
    if not origin:
        return "drawn at random by the seed"
    source = node.get("weights") or f"the pretrained weights of {str(node.get('_target_')).rpartition('.')[2]}"
    return f"{source}, taken as trained on {origin}; ε does not cover the examples they were trained on"


def is_named_by_configuration(node: Mapping[str, Any]) -> bool:
    """Tell whether the configuration alone decides the initial weights.

    It does for a model of dpopt that loads none. Of any other model, a hash of its initial state belongs into the key
    of the run's noise.
    """
    return str(node.get("_target_")).startswith("dpopt.models.") and not weights_origin(node)
