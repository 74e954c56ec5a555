"""Views that are all equal are refused; a run takes as many as it asks for."""

import pytest
import torch
from helpers import configure

from dpopt.data.map_source import MapSource
from dpopt.data.sources import TensorSource
from dpopt.data.views import check_views
from dpopt.training.run import run

IMAGES = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3
REFUSAL = "^views=4 takes 4 equal views of each example, because some is not augmented here: set views=1, or "


class Jittered(torch.utils.data.Dataset):
    def __init__(self, scale):
        self.scale = scale

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return IMAGES[index] + self.scale * torch.rand(()), LABELS[index]


@pytest.mark.parametrize(
    "plain, augmented",
    [
        (TensorSource(IMAGES, LABELS), TensorSource(IMAGES, LABELS, flip=True)),
        (MapSource(Jittered(0.0), torch.device("cpu"), 0), MapSource(Jittered(1.0), torch.device("cpu"), 0)),
    ],
    ids=["tensors", "dataset"],
)
def test_equal_views_are_refused(plain, augmented):
    with pytest.raises(ValueError, match=REFUSAL):
        check_views(plain, 4, "some")
    check_views(plain, 1, "some")
    check_views(augmented, 4, "some")


def test_a_run_is_refused_before_it_has_a_directory(tmp_path):
    config = configure("experiment=quickstart", "views=4", "steps=2", "epsilon=1", f"output_dir={tmp_path}/runs")
    with pytest.raises(ValueError, match="because digits is not augmented here"):
        run(config)
    assert not (tmp_path / "runs").exists()
