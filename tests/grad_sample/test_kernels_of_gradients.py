"""The kernels of sums and norms: those in C, and those in Triton, under its interpreter where there is no GPU."""

import importlib
import platform

import pytest
import torch
from timm.layers import ScaledStdConv2d
from torch import nn

from dpopt import native
from dpopt.grad_sample import c_library, conv, cpu_kernels, norms, per_sample, rules
from dpopt.grad_sample.standardized_conv import norms_through, standardized_norms, standardized_pull_back
from dpopt.models.layers import StandardizedConv2d

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NARROW = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cannot multiply bfloat16


def use(monkeypatch, module):
    for user in (norms, conv, per_sample, rules):
        monkeypatch.setattr(user, "kernels", lambda x: module)


@pytest.fixture(params=["cpu_kernels", "triton_kernels"])
def kernels(request, monkeypatch):
    """The kernels, wherever the engine would use them."""
    if request.param == "triton_kernels":
        pytest.importorskip("triton")
    elif DEVICE == "cuda":
        pytest.skip("a GPU is here")
    module = importlib.import_module(f"dpopt.grad_sample.{request.param}")
    use(monkeypatch, module)
    return module


@pytest.fixture
def on_gpu(monkeypatch):
    """Triton's, also where the engine looks whether a tensor lies on a GPU."""
    pytest.importorskip("triton")
    from dpopt.grad_sample import triton_kernels

    use(monkeypatch, triton_kernels)
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    return triton_kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 1000), (8, 2049)])
def test_weighted_sum(kernels, shape, dtype):
    """As a product of matrices; what an example of weight zero holds is not read."""
    torch.manual_seed(0)
    rows, weights = torch.randn(shape, device=DEVICE).to(dtype), torch.rand(shape[0], device=DEVICE)
    expected = weights.double() @ rows.double()
    if shape[0] > 1:
        expected -= weights[1].double() * rows[1].double()
        weights[1], rows[1] = 0.0, float("nan")
    torch.testing.assert_close(kernels.weighted_sum(rows, weights), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 4096), (4, 9001)])
def test_square_norms(kernels, shape, dtype):
    """Of rows that lie apart or in columns, of equal values, and of what is not finite."""
    torch.manual_seed(0)
    rows = torch.randn(shape[0], shape[1] + 3, device=DEVICE).to(dtype)[:, 1:-2]
    for x in (rows, rows.T.contiguous().T, torch.full_like(rows, 0.1)):
        torch.testing.assert_close(norms.square_norms(x), x.double().square().sum(1), rtol=4e-7, atol=0)
    for bad in (float("nan"), float("inf")):
        rows[0, 0] = bad
        assert norms.square_norms(rows).isfinite().tolist() == [False] + [True] * (len(rows) - 1)


def test_a_long_row_of_equal_values(kernels):
    """Which float32 would add up to too little, one after the other."""
    rows = torch.full((1, 5_000_000 if kernels.__name__.endswith("cpu_kernels") else 100_000), 0.1, device=DEVICE)
    expected = rows.double().square().sum(1)
    torch.testing.assert_close(norms.square_norms(rows), expected, rtol=2e-7, atol=0)


LAYERS = {
    "ours": lambda: StandardizedConv2d(4, 6, 3),
    "clamped": lambda: clamped(StandardizedConv2d(4, 6, 3)),
    "no gain": lambda: StandardizedConv2d(4, 6, 3, affine=False),
    "timm": lambda: ScaledStdConv2d(4, 6, 3, gamma=1.7),
    "frozen gain": lambda: frozen(StandardizedConv2d(4, 6, 3), "gain"),
    "frozen weight": lambda: frozen(StandardizedConv2d(4, 6, 3), "weight"),
}


def clamped(layer):
    with torch.no_grad():
        layer.weight[:3] *= 1e-3
    return layer


def frozen(layer, name):
    getattr(layer, name).requires_grad_(False)
    return layer


@pytest.mark.parametrize("layout", [(0, 1, 2, 3, 4), (0, 3, 1, 2, 4), (0, 1, 3, 4, 2)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_standardized(kernels, monkeypatch, name, layout):
    """Norms and pulled-back sums as by torch, of gradients along their filters, too, in every order in memory."""
    torch.manual_seed(0)
    layer = LAYERS[name]().to(DEVICE)
    gradient = 1e-3 * torch.randn(5, *layer.weight.shape, device=DEVICE) + layer.weight.detach()
    back = [layout.index(i) for i in range(5)]
    gradient = gradient.permute(layout).contiguous().permute(back)
    found = {"weight": gradient, "bias": torch.randn(5, 6, device=DEVICE)}
    norms, sums = norms_through(layer, found), standardized_pull_back(layer, {"weight": gradient[0]})
    use(monkeypatch, None)
    wide = {key: value.double() for key, value in found.items()}
    torch.testing.assert_close(norms, norms_through(layer.double(), wide), rtol=1e-6, atol=0)
    exact = standardized_pull_back(layer, {"weight": wide["weight"][0]})
    for key, value in sums.items():
        torch.testing.assert_close(value.double(), exact[key], rtol=1e-5, atol=1e-9)


def test_what_is_not_trained_may_overflow(monkeypatch):
    layer = frozen(frozen(StandardizedConv2d(4, 6, 3), "weight"), "gain").to(DEVICE)
    found = {"weight": torch.full((5, *layer.weight.shape), torch.inf), "bias": torch.ones(5, 6)}
    found = {name: gradient.to(DEVICE) for name, gradient in found.items()}
    for _ in range(2):
        assert standardized_norms(layer, found).tolist() == pytest.approx([6.0] * 5)
        assert standardized_norms(layer, found, {"bias": 2 * found["bias"][0]}).tolist() == pytest.approx([24.0] * 5)
        use(monkeypatch, None)


def test_standardized_filters_in_16_bits(kernels):
    """What a kernel reads of a model in bfloat16 is its weight, not its bytes."""
    torch.manual_seed(0)
    layer = StandardizedConv2d(4, 6, 3).bfloat16().to(DEVICE)
    found = {
        "weight": torch.randn(5, *layer.weight.shape, device=DEVICE).bfloat16(),
        "bias": torch.zeros(5, 6, device=DEVICE),
    }
    norms = norms_through(layer, found)
    expected = norms_through(layer.float(), {name: value.float() for name, value in found.items()})
    torch.testing.assert_close(norms, expected, rtol=1e-5, atol=0)


CONVOLUTIONS = [
    dict(out_channels=5, kernel_size=3, padding=1),
    dict(out_channels=20, kernel_size=(1, 3), stride=2, padding=(0, 2), dilation=(1, 2)),
    dict(out_channels=8, kernel_size=3, groups=2, stride=(1, 2)),
    dict(out_channels=4, kernel_size=1, groups=4, bias=False),
    dict(out_channels=70, kernel_size=2, padding="same"),
    dict(out_channels=3, kernel_size=3, padding=1, padding_mode="circular"),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolution(on_gpu, options, dtype):
    """As by autograd in float64, example by example, whatever the order in memory."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, **options).to(DEVICE)
    a = torch.randn(3, 2, 7, 9, 4, device=DEVICE).to(dtype).permute(0, 1, 4, 2, 3)
    g = torch.randn_like(layer(a.flatten(0, 1).float())).unflatten(0, (3, 2)).to(dtype)
    found = conv.conv(layer, a, g)["weight"]
    layer.double()
    for x, y, gradient in zip(a.double(), g.double(), found, strict=True):
        (expected,) = torch.autograd.grad(layer(x), layer.weight, y)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(gradient.double(), expected, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (0, 1, 3, 2)], ids=["rows", "channels", "columns"])
@pytest.mark.parametrize("channels", [3, 16, 40])
@pytest.mark.parametrize("options", [options for options in CONVOLUTIONS if "groups" not in options], ids=str)
def test_convolution_on_a_cpu(options, channels, order, dtype):
    """As by autograd in float64, whichever dimension is last in memory; in bfloat16 rounded once."""
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, **options).double()
    a = torch.randn(6, channels, 19, 21).to(dtype)
    g = torch.randn_like(layer(a.double())).to(dtype)
    a, g = (x.permute(order).contiguous().permute([order.index(i) for i in range(4)]) for x in (a, g))
    a, g = (x.unflatten(0, (3, 2)) for x in (a, g))
    assert cpu_kernels.convolves(a, g, 1) or dtype != torch.float32
    found = conv.conv(layer, a, g)["weight"]
    if cpu_kernels.convolves(a, g, 1):
        squares = found.double().square().flatten(1).sum(1)
        torch.testing.assert_close(per_sample.squares_of(None, {"weight": found})[""], squares, rtol=4e-7, atol=0)
    for x, y, gradient in zip(a.double(), g.double(), found, strict=True):
        (expected,) = torch.autograd.grad(layer(x), layer.weight, y)
        torch.testing.assert_close(gradient.double(), expected, rtol=5e-3 * (dtype != torch.float32), atol=1e-4)


@pytest.fixture(params=["native", "x86-64-v3", "x86-64"])
def processor(request, monkeypatch):
    """The kernels as built for this processor, or for one with fewer instructions."""
    if request.param != "native" and platform.machine() != "x86_64":
        pytest.skip("another kind of processor")
    monkeypatch.setattr(native, "_FLAGS", native._FLAGS.replace("-march=native", f"-march={request.param}"))
    c_library.library.cache_clear()
    yield
    c_library.library.cache_clear()


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU is here")
@pytest.mark.parametrize("options", CONVOLUTIONS[:2], ids=str)
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [3, 16, 40])
def test_recomputed_on_a_cpu(processor, monkeypatch, channels, dtype, views, options):
    """Norms and sums are those of one gradient, which is autograd's; an example of weight zero may hold NaN."""
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, **options)
    a = torch.randn(4, views, channels, 9, 11).to(dtype)
    g = torch.randn_like(layer(a.flatten(0, 1).float())).unflatten(0, (4, views)).to(dtype)
    if not conv.formed_on_chip(layer, g):
        assert dtype == torch.bfloat16
        return
    squares, formed = conv.conv_norms_on_chip(layer, a, g), conv.conv(layer, a, g)["weight"]
    weights, layer = torch.tensor([0.5, 0.0, 2.0, 1.0]), layer.double()
    exact = [
        torch.autograd.grad(layer(x), (layer.weight, layer.bias), y)
        for x, y in zip(a.double(), g.double(), strict=True)
    ]
    expected = torch.stack([sum(part.square().sum() for part in one) for one in exact])
    torch.testing.assert_close(squares, expected, rtol=1e-5, atol=0)
    a[1], g[1] = float("nan"), float("inf")
    sums = conv.conv_sum_on_chip(layer, a, g, weights)
    for i, name in enumerate(("weight", "bias")):
        total = sum(weight * one[i] for weight, one in zip(weights, exact, strict=True))
        torch.testing.assert_close(sums[name].double(), total, rtol=1e-5, atol=1e-4)
    if dtype == torch.float32:
        assert torch.equal(conv.conv_sum_on_chip(layer, a, g, torch.eye(4)[3])["weight"], formed[3])
    monkeypatch.setattr(cpu_kernels, "_ROOM", 1)
    torch.testing.assert_close(conv.conv_sum_on_chip(layer, a, g, weights), sums, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU is here")
@pytest.mark.parametrize("name", LAYERS)
def test_recomputed_through_standardized_filters(name):
    """Of gradients along a filter, too; norms that are taken as gradients are written are the same."""
    torch.manual_seed(0)
    layer, g = LAYERS[name](), torch.zeros(4, 1, 6, 3, 3)
    a = (layer.weight.detach()[[0, 2, 0, 5]] + 1e-3 * torch.randn(4, 4, 3, 3))[:, None]
    g[..., 1, 1] = torch.randn(4, 1, 6)  # one position meets the whole input
    gradient, weights = g[:, 0, :, 1, 1, None, None, None] * a, torch.tensor([0.5, 0.0, 2.0, 1.0])
    rule = rules.rule_for(layer)
    found, written = rule.on_chip.square_norms(layer, a, g), rule.gradients(layer, a, g)
    a[1], g[1] = float("nan"), float("inf")
    sums = rule.on_chip.weighted_sum(layer, a, g, weights)
    assert torch.equal(written["weight"], gradient) and written["weight"].through is not None
    torch.testing.assert_close(standardized_norms(layer, written), found, rtol=1e-14, atol=0)
    exact = {"weight": gradient.double(), "bias": written["bias"].double()}
    layer.double()
    torch.testing.assert_close(standardized_norms(layer, exact), found, rtol=1e-6, atol=0)
    total = {key: torch.einsum("b,b...->...", weights.double(), value) for key, value in exact.items()}
    for key, value in standardized_pull_back(layer, total).items():
        torch.testing.assert_close(sums[key].double(), value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_examples_of_a_convolution_on_a_cpu_do_not_meet(dtype):
    """Though they share the room in which they are laid out: one that is not finite leaves the others their bits."""
    torch.manual_seed(0)
    layer = nn.Conv2d(40, 12, 3, padding=1)
    a, g = torch.randn(8, 2, 40, 9, 9).to(dtype), torch.randn(8, 2, 12, 9, 9).to(dtype)
    before = conv.conv_weight(layer, a, g)
    a[3], g[5] = float("nan"), float("inf")
    after = conv.conv_weight(layer, a, g)
    assert [torch.equal(x, y) for x, y in zip(before, after, strict=True)] == [i not in (3, 5) for i in range(8)]
    assert per_sample.squares_of(None, {"weight": after})[""].isfinite().tolist() == [i not in (3, 5) for i in range(8)]


@pytest.mark.parametrize("own", [False, True])
def test_parts_of_work_are_done_once(monkeypatch, own):
    """In torch's threads and in others; an error in one of them arrives."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    if own:
        monkeypatch.setattr(native, "_openmp", lambda process: None)
    done = []
    native.in_parts(lambda begin, end: done.extend(range(begin, end)), 1000, 7)
    assert sorted(done) == list(range(1000))
    with pytest.raises(ZeroDivisionError):
        native.in_parts(lambda begin, end: 1 / (begin and 0), 100, 7)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_a_row_is_a_convolution_too(on_gpu):
    """Conv1d, with zeros on one side only."""
    torch.manual_seed(0)
    layer = nn.Conv1d(3, 5, 4, padding="same").to(DEVICE)
    a, g = torch.randn(2, 1, 3, 11, device=DEVICE), torch.randn(2, 1, 5, 11, device=DEVICE)
    for x, y, gradient in zip(a, g, conv.conv(layer, a, g)["weight"], strict=True):
        torch.testing.assert_close(gradient, torch.autograd.grad(layer(x), layer.weight, y)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm(on_gpu, dtype):
    """As by autograd in float64, of inputs far from zero, too."""
    torch.manual_seed(0)
    layer = nn.GroupNorm(3, 6).to(DEVICE)
    a = (5 + torch.randn(4, 2, 6, 5, 7, device=DEVICE)).to(dtype)
    g = torch.randn_like(a)
    found = rules.group_norm(layer, a, g)
    layer.double()
    for i, (x, y) in enumerate(zip(a.double(), g.double(), strict=True)):
        for name, expected in zip(found, torch.autograd.grad(layer(x), [layer.weight, layer.bias], y), strict=True):
            torch.testing.assert_close(found[name][i].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU is here")
def test_without_a_compiler_torch_does_it(monkeypatch, tmp_path):
    """Quietly: the same but for rounding."""
    rows = torch.randn(5, 999)
    with_compiler = norms.square_norms(rows)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    for known in (c_library.available, c_library.library):
        known.cache_clear()
    try:
        assert norms.kernels(rows) is None
        torch.testing.assert_close(norms.square_norms(rows), with_compiler, rtol=1e-6, atol=0)
    finally:
        for known in (c_library.available, c_library.library):
            known.cache_clear()
