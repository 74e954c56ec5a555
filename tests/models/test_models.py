import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from text_models import BERT

from dpopt import models
from dpopt.config.schema import CONF
from dpopt.grad_sample.engine import per_example_gradients
from dpopt.grad_sample.model_check import check_model
from dpopt.models.layers import StandardizedConv2d

pytestmark = pytest.mark.slow


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "make, classes, expected",
    [
        (models.wrn_16_4, 10, 2_753_818),
        (models.wrn_40_4, 10, 8_961_306),
        (models.nf_resnet50, 1000, 25_503_928),
        (models.cnn, 10, 21_578),
        (models.cnn5, 10, 411_466),
        (models.tanh_cnn, 10, 26_010),
        (models.linear, 10, 7_850),
        (models.squeezenet, 10, 722_496 + 5_130),
    ],
)
def test_parameter_counts(make, classes, expected):
    assert count(make(num_classes=classes)) == expected


@pytest.mark.parametrize("size, expected", [("tiny", 5_717_416), ("small", 22_050_664), ("base", 86_567_656)])
def test_deit_parameter_counts(size, expected):
    """Touvron et al. give 5 M, 22 M and 86 M."""
    assert count(getattr(models, f"deit_{size}")(pretrained=False)) == expected


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        ("tanh_cnn_28", (1, 28), 26_010),
        ("tanh_cnn_32", (3, 32), 550_570),
        ("scattering_cnn_28", (81, 7), 33_066),
        ("scattering_cnn_32", (243, 8), 187_210),
    ],
)
def test_parameter_counts_of_networks_with_tanh(name, shape, expected):
    """2007.14191 states 26,010, 2011.11660 states 187K; the comment of each file says what it is."""
    text = (CONF / "model" / f"{name}.yaml").read_text()
    node = yaml.safe_load(text)
    model = models.tanh_cnn(10, *shape, layers=node["layers"], hidden=node["hidden"])
    assert count(model) == expected and f"{expected:,} parameters" in text
    per_example_gradients(model, F.cross_entropy, torch.randn(2, 1, *shape, shape[1]), torch.tensor([0, 1]))


def test_networks_with_tanh_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"images of 4 pixels are too small .*: drop one"):
        models.tanh_cnn(image_size=4, layers=[[16, 8, 2, 0]])
    with pytest.raises(ValueError, match=r"the layer \[2, 2, 2\] must have four numbers"):
        models.tanh_cnn(layers=[[2, 2, 2]])
    with pytest.raises(ValueError, match="'gelu' is not known: use tanh or relu"):
        models.tanh_cnn(activation="gelu")
    parts = {type(part) for part in models.tanh_cnn(activation="relu")}
    assert torch.nn.ReLU in parts and torch.nn.Tanh not in parts


def test_standardized_convolution_by_hand():
    conv = StandardizedConv2d(2, 3, 3)
    with torch.no_grad():
        conv.gain.copy_(torch.tensor([1.0, 2.0, -1.0]))
    weight = conv.standardized_weight()
    flat = conv.weight.flatten(1)
    centered = flat - flat.mean(1, keepdim=True)
    expected = centered / (centered.square().sum(1, keepdim=True)).sqrt() * conv.gain[:, None]
    torch.testing.assert_close(weight.flatten(1), expected)
    with torch.no_grad():
        conv.weight.fill_(0.3)  # no variance: what is left is how the mean was rounded
    assert conv.standardized_weight().abs().max() <= 2 * 0.3 * torch.finfo(torch.float32).eps / 1e-2


def test_nf_resnet_keeps_unit_variance_at_the_start():
    torch.manual_seed(0)
    model = models.nf_resnet50(num_classes=10).eval()
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, inputs: seen.append(float(inputs[0].std()) * module.beta))
    with torch.no_grad():
        model(torch.randn(2, 3, 128, 128))
    assert len(seen) == 16 and all(0.3 < value < 2.5 for value in seen)


def test_every_model_is_admitted():
    for name in models.__all__:
        options = {"pretrained": False} if name.startswith("deit") else {}
        options |= {"config": BERT} if name == "transformer" else {"in_channels": 3}
        check_model(getattr(models, name)(num_classes=5, **options), private=True)


def test_head_only_has_gradients_for_the_head_alone():
    model = models.deit_tiny(num_classes=4, pretrained=False, image_size=32, train="head")
    gradients, _ = per_example_gradients(model, F.cross_entropy, torch.randn(3, 1, 3, 32, 32), torch.tensor([0, 1, 2]))
    assert set(gradients) == {"head.weight", "head.bias"} and gradients["head.weight"].shape == (3, 4, 192)
    assert (model.head.weight == 0).all()


def test_weights_from_a_local_file(tmp_path):
    source = models.deit_tiny(num_classes=1000, pretrained=False, image_size=32, zero_head=False)
    path = tmp_path / "deit.safetensors"
    save_file(source.state_dict(), path)
    model = models.deit_tiny(num_classes=4, image_size=32, weights=str(path))
    assert torch.equal(model.blocks[3].mlp.fc1.weight, source.blocks[3].mlp.fc1.weight)
    assert model.head.weight.shape == (4, 192)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        models.deit_tiny(weights=str(tmp_path / "none.pt"))
    with pytest.raises(ValueError, match="train=none must be"):
        models.deit_tiny(pretrained=False, train="none")


def test_weights_that_cannot_be_had(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the environment is read at import
    with pytest.raises(ValueError, match=r"model.weights=PATH, or train from scratch"):
        models.deit_tiny(num_classes=4)


def test_bad_depth():
    with pytest.raises(ValueError, match="6n"):
        models.wrn.WideResNet(17, 4)


def test_squeezenet_is_torchvisions(tmp_path):
    """On raw pixels minus Caffe's means, with the weights of a file; what is trained is what was asked for."""
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    source = squeezenet1_1(num_classes=7).eval()
    path = tmp_path / "squeezenet.safetensors"
    save_file({name: value for name, value in source.state_dict().items() if name.startswith("features.")}, path)
    model = models.squeezenet(num_classes=4, weights=str(path), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    pixels = torch.randint(256, (2, 3, 48, 48)).float()
    normalized = (pixels / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[
        :, None, None
    ]
    expected = source.features(pixels - torch.tensor([123.68, 116.779, 103.939])[:, None, None]).mean((2, 3))
    torch.testing.assert_close(model[:-1](normalized), expected, rtol=1e-4, atol=1e-4)
    assert (model(normalized) == 0).all()
    for train, count_trained in (("all", 722_496 + 2_052), ("fires", 386_176 + 2_052), ("head", 2_052)):
        model = models.squeezenet(num_classes=4, weights=str(path), train=train)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count_trained, train


def test_what_squeezenet_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist: give the path"):
        models.squeezenet(weights="nowhere")
    other = tmp_path / "other.safetensors"
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, other)
    with pytest.raises(ValueError, match=r"do not fit \(features.0.bias\)"):
        models.squeezenet(weights=str(other))
    other.write_text("no weights")
    with pytest.raises(ValueError, match="do not fit"):
        models.squeezenet(weights=str(other))
    with pytest.raises(ValueError, match="train=some must be all"):
        models.squeezenet(train="some")
    with pytest.raises(ValueError, match="3 channels, not 1"):
        models.squeezenet(in_channels=1)


def test_activations_of_cnn5():
    """(2, 2, 1) is tanh; the default is that of 2007.14191, 0.08 at 0."""
    from dpopt.models.cnn5 import TemperedSigmoid

    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(TemperedSigmoid(2.0, 2.0, 1.0)(x), torch.tanh(x))
    assert float(TemperedSigmoid()(torch.zeros(()))) == pytest.approx(0.08)
    for activation in ("tanh", "relu", "tempered_sigmoid"):
        assert models.cnn5(activation=activation)(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match="activation=gelu must be one of tanh"):
        models.cnn5(activation="gelu")
