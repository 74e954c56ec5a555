"""A look at augmented views before training: K equal views cost K times the work and change nothing."""

import torch

from dpopt.data.sources import Source
from dpopt.rng import RandomKey

_EXAMPLES = 8


def check_views(source: Source, views: int, name: str) -> None:
    """Check that the views of an example differ, on the first examples.

    Args:
        source: the training examples.
        views: K.
        name: of the dataset.

    Raises:
        ValueError: when all of them are equal.
    """
    first = torch.arange(min(_EXAMPLES, len(source)))
    if views == 1 or not len(first):
        return
    pieces = source.views([(0, first)], RandomKey.from_seed(0), views, len(first))
    if all(torch.equal(inputs, inputs[:, :1].expand_as(inputs)) for inputs, _ in pieces):
        raise ValueError(
            f"views={views} takes {views} equal views of each example, because {name} is not augmented here: set "
            "views=1, or dataset.augment=true where the dataset has it"
        )
