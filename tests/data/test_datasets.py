"""Data sets by name, on the data that is shipped or made here."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dpopt import data
from dpopt.data.scattering import scatter


def load(spec, tmp_path, workers=0):
    return spec.load(tmp_path, torch.device("cpu"), workers)


def test_digits(tmp_path):
    spec = data.digits()
    train, test = load(spec, tmp_path)
    assert (len(train), len(test)) == (spec.train_size, 360) and len(test) / 1797 >= 0.2
    inputs, targets = next(train.plain(2000))
    assert inputs.shape == (1437, *spec.shape) and set(targets.tolist()) == set(range(10))
    assert abs(float(inputs.mean())) < 0.1 and abs(float(inputs.std()) - 1) < 0.1
    together = torch.cat([train.inputs, test.inputs]).flatten(1)
    assert len({tuple(row.tolist()) for row in together}) == 1797  # the split repeats nothing


@pytest.mark.cifar10
def test_cifar10(cifar_dir):
    spec = data.cifar10()
    train, test = load(spec, cifar_dir)
    assert (len(train), len(test)) == (spec.train_size, 10_000)
    inputs, targets = next(train.plain(5000))
    assert inputs.shape == (5000, *spec.shape) and targets.max() == 9
    assert inputs.mean((0, 2, 3)).abs().max() < 0.05 and (inputs.std((0, 2, 3)) - 1).abs().max() < 0.05
    assert train.crop == 4 and train.flip and not (test.crop or test.flip)


@pytest.mark.parametrize(
    "spec", [data.cifar10(), data.cifar100(), data.mnist(), data.fashion_mnist()], ids=lambda s: s.name
)
def test_missing_files_are_explained(spec, tmp_path, monkeypatch):
    import torchvision.datasets

    def refuse(self):
        raise OSError("no network")

    for name in ("CIFAR10", "MNIST"):  # CIFAR-100 and Fashion-MNIST inherit from them
        monkeypatch.setattr(getattr(torchvision.datasets, name), "download", refuse)
    with pytest.raises(FileNotFoundError, match="put its files there, or set data_dir"):
        load(spec, tmp_path)
    with pytest.raises(FileNotFoundError):
        load(spec, tmp_path / "not" / "there")
    assert not (tmp_path / "not" / "there").exists() and not any(p.suffix == ".lock" for p in tmp_path.iterdir())


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_gray_images_from_files(tmp_path, name, folder):
    """Four tiny files in the original format stand for the real ones; scattering features are computed of them."""
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 6), ("t10k", 4)):
        images = torch.arange(count * 28 * 28).remainder(256).to(torch.uint8)
        header = b"\x00\x00\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + bytes(images.tolist()))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01" + count.to_bytes(4, "big") + bytes(count))
    train, test = load(getattr(data, name)(augment=True), tmp_path)
    assert len(train) == 6 and len(test) == 4 and next(train.plain(6))[0].shape == (6, 1, 28, 28)
    assert train.crop == 2 and test.crop == 0 and train.flip == (name == "fashion_mnist")  # digits are not mirrored
    plain = getattr(data, name)(normalize=False)
    pixels = next(load(plain, tmp_path)[0].plain(6))[0]
    assert pixels.min() == 0 and pixels.max() == 1 and plain.constants == "pixels in [0, 1]"
    for groups in (27, None):
        spec = getattr(data, f"{name}_scattering")(groups)
        features = next(load(spec, tmp_path)[0].plain(6))[0].float()
        expected = scatter(pixels) if groups is None else F.group_norm(scatter(pixels), groups)
        assert spec.shape == (81, 7, 7) and torch.allclose(features, expected, atol=4e-3)
        assert ("by its own groups" in spec.constants) == bool(groups) and spec.name == f"{name}_scattering"


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(tmp_path / "pets" / part / name / f"{index}.jpg")
    return tmp_path


def test_image_folders(folder):
    spec = data.imagenet("pets", image_size=32, train_size=12, classes=2)
    train, test = load(spec, folder, workers=1)
    inputs, targets = next(test.plain(4))
    assert inputs.shape == (4, 3, 32, 32) and targets.tolist() == [0, 0, 1, 1] and len(train) == 12
    assert train.fingerprint() != test.fingerprint()
    with pytest.raises(ValueError, match=r"set dataset.train_size=12 dataset.classes=2"):
        load(data.imagenet("pets", train_size=13, classes=2), folder)
    with pytest.raises(FileNotFoundError, match="set data_dir"):
        load(data.imagenet("birds"), folder)


@pytest.mark.slow
def test_training_on_an_image_folder(command, folder):
    """Every row of the table from file to result: workers, views, transforms, NF-ResNet-50."""
    done = command(
        "train",
        *("dataset=imagenet", "dataset.folder=pets", "dataset.image_size=32", "dataset.train_size=12"),
        *("dataset.classes=2", "model=nf_resnet50", "batch_size=3", "steps=2", "views=2", "delta=1e-2", "logger=csv"),
        *(f"data_dir={folder}", f"output_dir={folder}/runs", "workers=1", "micro_batch=2", "eval_every=2"),
    )
    assert done.returncode == 0, done.stderr
    assert len(list(folder.glob("runs/pets-nf_resnet50-*/result.json"))) == 1


def test_scattering_features_are_computed_once(tmp_path, monkeypatch):
    """From pictures made here; the second load reads the file, and each example is normalized by itself."""
    from dpopt.data.sources import TensorSource

    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8, generator=generator)
    parts = [
        TensorSource(pictures[i], torch.arange(len(pictures[i])), (0.5,) * 3, (0.2,) * 3)
        for i in (slice(8), slice(8, 12))
    ]
    loads = []
    spec = data.DataSpec("cifar10", 8, 10, (3, 32, 32), lambda *_: loads.append(1) or tuple(parts))
    monkeypatch.setattr(data.features, "cifar10", lambda augment: spec)
    features = data.cifar10_scattering()
    assert features.shape == (243, 8, 8) and features.train_size == 8
    for _ in range(2):
        train, test = load(features, tmp_path)
        assert len(loads) == 1 and len(train) == 8 and len(test) == 4
        inputs, targets = next(train.plain(8))
        assert inputs.shape == (8, *features.shape) and targets.tolist() == list(range(8))
        groups = inputs.float().unflatten(1, (27, 9)).flatten(2)
        assert groups.mean(2).abs().max() < 2e-3 and (groups.std(2) - 1).abs().max() < 0.1  # GroupNorm's ε is felt
        assert not train.flip
    train, test = load(data.cifar10_scattering(groups=None, augment=True), tmp_path)
    assert train.flip and sorted(train.flip_channels) == list(range(243)) and not test.flip
    with pytest.raises(ValueError, match="cannot be mirrored"):
        data.cifar10_scattering(augment=True)


def test_features_of_a_network_are_computed_once(tmp_path, monkeypatch):
    """By the weights of a file in the data folder."""
    from safetensors.torch import save_file
    from torchvision.models import squeezenet1_1

    from dpopt.data.sources import TensorSource

    torch.manual_seed(0)
    save_file(squeezenet1_1().state_dict(), tmp_path / "squeezenet1_1.safetensors")
    pictures = torch.randint(256, (6, 3, 48, 48), dtype=torch.uint8)
    part = TensorSource(pictures, torch.arange(6), (0.5,) * 3, (0.2,) * 3)
    spec = data.DataSpec("cifar10", 6, 10, (3, 48, 48), lambda *_: (part, part))
    monkeypatch.setattr(data.features, "cifar10", lambda augment, image_size: spec)
    features = data.cifar10_squeezenet(image_size=48)
    assert features.shape == (512, 1, 1) and "trained on ImageNet, which ε does not cover" in features.constants
    train, _ = load(features, tmp_path)
    (tmp_path / "squeezenet1_1.safetensors").unlink()
    again, _ = load(features, tmp_path)
    inputs, _ = next(train.plain(6))
    assert torch.equal(inputs, next(again.plain(6))[0]) and inputs.shape == (6, 512, 1, 1)
    assert inputs.float().mean(1).abs().max() < 2e-3 and (inputs.float().std(1) - 1).abs().max() < 1e-2


def test_features_of_pictures_that_cannot_be_had_say_so(tmp_path, monkeypatch):
    """And do not wait for ever for a lock that they hold themselves."""
    from threading import Thread

    import torchvision

    def refuse(**_):
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", refuse)
    errors = []

    def try_it():
        try:
            load(data.cifar10_scattering(), tmp_path / "new")
        except FileNotFoundError as error:
            errors.append(str(error))

    thread = Thread(target=try_it, daemon=True)
    thread.start()
    thread.join(30)
    assert len(errors) == 1 and "could not be downloaded (no network)" in errors[0], "hangs, or fails otherwise"
    assert not (tmp_path / "new").exists()


def test_folders_that_cannot_be_used(folder):
    spec = data.imagenet("pets", image_size=32, train_size=12, classes=2)
    root = folder / "pets"
    (root / "train" / "bird").mkdir()
    with pytest.raises(FileNotFoundError, match=r"pets/train has class folders without images \(bird\): give each"):
        load(spec, folder)
    (root / "train" / "bird").rmdir()
    (root / "val" / "dog").rename(root / "val" / "wolf")
    with pytest.raises(ValueError, match=r"differ in their class folders \(dog, wolf\): give both the same"):
        load(spec, folder)
    (root / "empty" / "train").mkdir(parents=True)
    (root / "empty" / "val").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty/train has no class folders: put the images at"):
        load(data.imagenet("pets/empty", train_size=12, classes=2), folder)


@pytest.mark.slow
def test_a_damaged_image_does_not_block_the_run_once_repaired(command, folder):
    """It is named before there is a run directory, in a run that begins and in one that is resumed."""
    short = [
        *("dataset=imagenet", "dataset.folder=pets", "dataset.image_size=32", "dataset.train_size=12"),
        *("dataset.classes=2", "model=cnn", "model.widths=[8]", "batch_size=6", "steps=3", "delta=1e-2"),
        *("logger=csv", f"data_dir={folder}", "workers=0", "eval_every=2", "device=cpu"),
    ]
    path = folder / "pets/train/dog/3.jpg"
    good, about = path.read_bytes(), path.stat()
    path.write_bytes(good[:300])
    done = command("train", *short)
    assert done.returncode == 1 and f"{path} cannot be read as an image" in done.stderr
    assert not list(folder.glob("runs/pets-*")), "a run directory was made"
    path.write_bytes(good)
    assert command("train", *short, "time_limit=0").returncode == 0
    path.write_bytes(good[:300])
    assert "cannot be read as an image" in command("train", *short).stderr
    path.write_bytes(good)
    done = command("train", *short)
    assert done.returncode == 0, done.stderr
    assert about.st_size == len(good) and len(list(folder.glob("runs/pets-*/model.safetensors"))) == 1


def as_file(pixels, path):
    """Write a raw image (C, H, W), and read it again."""
    array = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    Image.fromarray(array.numpy()).save(path)
    return Image.open(path)


@pytest.mark.parametrize(
    "spec",
    [
        data.digits(),
        pytest.param(data.cifar10(), marks=pytest.mark.cifar10),
        pytest.param(data.cifar10(image_size=48), marks=pytest.mark.cifar10, id="cifar10_48"),
    ],
    ids=lambda spec: spec.name,
)
def test_a_file_becomes_the_input_of_the_test_set(spec, tmp_path, request):
    """Bit by bit, whatever else is in the batch."""
    place = request.getfixturevalue("cifar_dir") if spec.name == "cifar10" else tmp_path
    _, test = load(spec, place)
    expected = next(iter(test.subset(torch.arange(5)).plain(5)))[0]
    found = [spec.inputs(as_file(pixels, tmp_path / "a.png")) for pixels in test.inputs[:5]]
    assert torch.equal(torch.stack(found), expected) and found[0].shape == spec.shape
    with pytest.raises(ValueError, match=r"is 40×30 where the model was trained on (8×8|32×32): resize it first"):
        spec.inputs(Image.new("RGB", (40, 30)))


def test_a_photo_becomes_the_input_of_the_test_folder(folder):
    spec = data.imagenet("pets", image_size=32, train_size=12, classes=2)
    _, test = load(spec, folder)
    expected = torch.cat([inputs for inputs, _ in test.plain(3)])
    paths = [path for path, _ in test.dataset.samples]
    assert torch.equal(torch.stack([spec.inputs(Image.open(path)) for path in paths]), expected)
    assert spec.inputs(Image.new("RGBA", (70, 40))).shape == spec.inputs(Image.new("L", (9, 70))).shape == spec.shape
    assert spec.inputs.to_json()["steps"][2] == "crop the center to 32×32"
    assert "resize the shorter side to 37" in spec.inputs.to_json()["steps"][1]


@pytest.mark.cifar10
def test_names_of_classes_are_those_of_the_files(cifar_dir):
    from torchvision.datasets import CIFAR10

    from dpopt.data import inputs

    assert tuple(CIFAR10(cifar_dir, download=False).classes) == inputs.CIFAR10
    assert len(inputs.CIFAR100) == 100 and sorted(inputs.CIFAR100) == list(inputs.CIFAR100)
    assert inputs.class_names((), 3) == inputs.class_names(("a",), 3) == ["0", "1", "2"]
