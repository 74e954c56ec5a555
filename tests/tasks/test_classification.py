"""Classification: what a model gets to know of the dataset."""

import pytest
import torch
from helpers import configure

from dpopt.data.datasets import DataSpec
from dpopt.tasks import Classification
from dpopt.training.build import build_model


def spec(*shape):
    return DataSpec("mine", 8, 3, shape, lambda *_: (None, None))


@pytest.mark.parametrize("shape", [(5,), (3, 8, 8)], ids=str)
def test_a_linear_model_of_images_and_of_tables(shape):
    task = Classification(spec(*shape))
    model = build_model(configure("model=linear"), task, offline=False)
    task.check(model)
    assert model(torch.zeros(2, *shape)).shape == (2, 3)


def test_a_key_that_contradicts_the_dataset_is_refused():
    config = configure("model=linear", "+model.image_size=28")
    with pytest.raises(ValueError, match=r"model\.image_size=28 contradicts the dataset, which has 8: leave it out"):
        build_model(config, Classification(spec(3, 8, 8)), offline=False)
    build_model(config, Classification(spec(3, 28, 28)), offline=False)
