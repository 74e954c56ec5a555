"""Private runs on the images that the initial weights were trained on are refused."""

from dataclasses import replace

import pytest

from dpopt import data
from dpopt.data.pretraining import check_pretraining, same_records
from dpopt.models.pretrained import describe_weights, is_named_by_configuration, weights_origin

DEIT = {"_target_": "dpopt.models.deit_small", "pretrained": True, "weights": None}
SCRATCH = {**DEIT, "pretrained": False}
WORDNET = ("n01440764", "n01443537", "n01484850")


def spec(folder="pets", size=12, **options):
    return data.imagenet(folder, train_size=size, classes=2, **options)


@pytest.mark.parametrize("model", [DEIT, {**SCRATCH, "weights": "deit.safetensors"}, {"weights": "IMAGENET1K_V1"}])
@pytest.mark.parametrize(
    "dataset, classes",
    [
        (data.imagenet(), ()),
        (spec("imagenet"), ()),
        (spec("/data/ILSVRC2012/images"), ()),
        (spec("tiny-imagenet-200"), ()),
        (spec("imagenette2"), ()),
        (spec("in1k"), ()),
        (spec("images", size=1_281_167), ()),
        (spec("images"), WORDNET),
        (spec("pets", is_imagenet=True), ("cat", "dog")),
        (data.DataSpec("imagenet64", 1, 1000, (3, 64, 64), None), ()),
    ],
)
def test_imagenet_on_imagenets_weights(model, dataset, classes):
    with pytest.raises(ValueError, match=r"trained on imagenet, whose images .* holds.*dataset.is_imagenet=false"):
        check_pretraining(dataset, model, classes)
    check_pretraining(dataset, SCRATCH, classes)
    check_pretraining(dataset, {**model, "pretrained_on": "places365"}, classes)


@pytest.mark.parametrize(
    "dataset, classes",
    [
        (spec("pets"), ("cat", "dog")),
        (spec("train1k"), ()),
        (spec("imagenet", is_imagenet=False), ()),
        (spec("images", is_imagenet=False), WORDNET),
        (data.cifar10(), ()),
        (data.digits(), ()),
        (data.DataSpec("imagenet_like", 1, 2, (3, 8, 8), None, collection=""), ()),
    ],
)
def test_other_images_on_imagenets_weights(dataset, classes):
    check_pretraining(dataset, DEIT, classes)


def test_any_collection_that_is_stated():
    places = data.DataSpec("rooms", 1, 2, (3, 8, 8), None, collection="Places365")
    with pytest.raises(ValueError, match="trained on places365"):
        check_pretraining(places, {"weights": "w.pt", "pretrained_on": "places365"})
    check_pretraining(places, DEIT)


def test_what_the_card_says_of_weights_and_constants():
    assert describe_weights(SCRATCH) == "drawn at random by the seed" and weights_origin(SCRATCH) == ""
    assert describe_weights(DEIT).startswith("the pretrained weights of deit_small, taken as trained on imagenet")
    assert describe_weights({**DEIT, "weights": "w.pt"}).startswith("w.pt, taken as trained on imagenet")
    assert is_named_by_configuration(SCRATCH) and not is_named_by_configuration(DEIT)
    assert not is_named_by_configuration({"_target_": "my_models.net"})
    assert data.cifar10().constants == (
        "mean 0.4914, 0.4822, 0.4465, std 0.247, 0.2435, 0.2616 (published for CIFAR-10)"
    )
    for made in (data.digits(), data.fashion_mnist(), data.cifar100(), data.cifar10_scattering(), data.imagenet()):
        assert made.constants.startswith("mean ")
    assert replace(data.digits(), constants="").constants == ""


def test_weights_of_the_dataset_are_refused_by_its_name_and_in_every_form():
    """CIFAR-10 as images, features or clients, and a folder that the weights name."""
    parts = data.imagenet(folder="parts", train_size=3, classes=2)
    forms = [data.cifar10(image_size=64), data.cifar10_scattering(), data.cifar10_squeezenet()]
    forms += [data.clients(), data.clients(of="dpopt.data.cifar10_scattering")]
    for spec, origin in [*((form, "CIFAR-10") for form in forms), (parts, "parts")]:
        with pytest.raises(ValueError, match="the initial weights were trained on"):
            check_pretraining(spec, {"weights": "f", "pretrained_on": origin})
        check_pretraining(spec, {"weights": "f", "pretrained_on": "CIFAR-100"})
    assert all(same_records(one, other) for one in forms for other in forms)
    assert not any(same_records(form, data.cifar100()) for form in forms)
