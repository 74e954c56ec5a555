"""Families of models from timm and torchvision: exact against a loop over examples, in float64."""

import pytest
import timm
import torch
import torchvision
from helpers import assert_exact
from torch import nn

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:There is a performance drop")]


def independent(model):
    """The model with GroupNorm for BatchNorm, and without random numbers."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            norm, act = nn.GroupNorm(1, child.num_features), getattr(child, "act", None)
            setattr(model, name, norm if act is None else nn.Sequential(norm, act))
        else:
            independent(child)
    for name in ("drop_prob", "p"):
        if isinstance(getattr(model, name, None), float):
            setattr(model, name, 0.0)
    return model


def vision(name, **options):
    return independent(timm.create_model(name, num_classes=3, **options))


SMALL = dict(img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=2)
WINDOWED = dict(img_size=32, patch_size=2, window_size=4, depths=(2, 2), num_heads=(2, 4), embed_dim=8)
FAMILIES = {
    "torchvision swin": lambda: torchvision.models.SwinTransformer(
        [4, 4], 8, [2, 2], [2, 2], [4, 4], num_classes=3, stochastic_depth_prob=0.0
    ),
    "torchvision vit": lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=3),
    "torchvision mobilenet": lambda: independent(torchvision.models.mobilenet_v3_small(num_classes=3, width_mult=0.5)),
    "swin": lambda: vision("swin_tiny_patch4_window7_224", **WINDOWED),
    "swin v2": lambda: vision("swinv2_tiny_window8_256", **WINDOWED),
    "cait": lambda: vision("cait_xxs24_224", **SMALL),
    "deit": lambda: vision("deit_tiny_distilled_patch16_224", **SMALL),
    "beit": lambda: vision("beit_base_patch16_224", **SMALL),
    "eva": lambda: vision("eva02_tiny_patch14_224", **SMALL),
    "relative positions": lambda: vision("vit_relpos_small_patch16_224", **SMALL),
    "xcit": lambda: vision("xcit_nano_12_p16_224", **{**SMALL, "patch_size": 16}),
    "convnext": lambda: vision("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    "mixer": lambda: vision("mixer_s32_224", img_size=64),
    "poolformer": lambda: vision("poolformer_s12"),
    "mobilenet": lambda: vision("mobilenetv2_035"),
    "levit": lambda: vision("levit_128s", img_size=64),
    "coat": lambda: vision("coat_lite_tiny", img_size=32),
    "twins": lambda: vision("twins_svt_small", img_size=32, depths=(1, 1, 1, 1)),
    "hiera": lambda: vision("hiera_tiny_224", img_size=64, stages=(1, 1, 1, 1), embed_dim=24),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    torch.manual_seed(0)
    model = FAMILIES[name]()
    size = 64 if name in ("levit", "hiera", "mixer") else 32
    inputs = torch.randn(3, 1, 3, size, size)
    plans = assert_exact(model, inputs, torch.arange(3), policies=["auto"], tolerance=1e-9)
    assert not any("example by example" in fallback for fallback in plans["auto"][1])
