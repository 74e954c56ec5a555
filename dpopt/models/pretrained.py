"""What a model's initial weights come from: needed for the privacy card and for the key of a run's noise.

ε covers what is trained on here, not what the initial weights have learned before. Where the two are the same images,
it covers nothing.
"""

from collections.abc import Mapping
from typing import Any

UNSTATED = "unstated collections"


def weights_origin(node: Mapping[str, Any]) -> str:
    """Name the collections that initial weights were trained on, separated by commas; empty for random weights.

    Weights of timm and torchvision, and files of weights, count as ImageNet's unless `pretrained_on` names another.
    Those of a transformer, which has a `path`, are UNSTATED then.

    Args:
        node: the model's arguments, defaults included.
    """
    loads = node.get("pretrained") and node.get("path", True)
    if not (loads or node.get("weights")):
        return ""
    return str(node.get("pretrained_on") or (UNSTATED if "path" in node else "imagenet"))


def describe_weights(node: Mapping[str, Any]) -> str:
    """Say where a model's initial weights come from, for the privacy card."""
    origin = weights_origin(node)
    if not origin:
        return "drawn at random by the seed"
    source = (
        node.get("path")
        or node.get("weights")
        or f"the pretrained weights of {str(node.get('_target_')).rpartition('.')[2]}"
    )
    return f"{source}, taken as trained on {origin}; ε does not cover the examples they were trained on"


def is_named_by_configuration(node: Mapping[str, Any]) -> bool:
    """Tell whether the configuration alone decides the initial weights.

    It does for a model of dpopt that loads none. Of any other model, a hash of its initial state belongs into the key
    of the run's noise.
    """
    return str(node.get("_target_")).startswith("dpopt.models.") and not weights_origin(node)
