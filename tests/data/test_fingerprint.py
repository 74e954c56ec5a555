"""Fingerprints of tensors, folders, Datasets and weights; the key under which they are written down."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dpopt.data import image_files
from dpopt.data.fingerprint import FingerprintKey, file_fingerprint, home, module_fingerprint, progress
from dpopt.data.sources import MapSource, TensorSource, as_source

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("DPOPT_HOME", str(tmp_path / "home"))


def make_folder(root, count=5, suffix="bmp", seed=0):
    """Two classes of random images, all older than the cache's settling time."""
    generator = np.random.default_rng(seed)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(count):
            path = root / name / f"{i}.{suffix}"
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return root


def folder_source(root):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import ToTensor

    return MapSource(ImageFolder(root, ToTensor()), CPU)


def settled(monkeypatch):
    monkeypatch.setattr(image_files, "_SETTLED", -1.0)


def test_the_key_is_made_once_for_the_owner_alone(tmp_path):
    key = FingerprintKey.load()
    path = tmp_path / "home" / "fingerprint.key"
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    assert [p.name for p in path.parent.iterdir()] == ["fingerprint.key"]
    assert FingerprintKey.load() == key and key.material.hex() not in repr(key)
    assert key.mac("a") == FingerprintKey.load().mac("a") != key.mac("b") and len(key.mac("a")) == 64
    other = FingerprintKey(bytes(range(32)))
    assert other.key_id != key.key_id and other.mac("a") != key.mac("a") and key.key_id not in key.mac("id")


@pytest.mark.parametrize("content", [b"", b"short", bytes(32), bytes(33)])
def test_a_damaged_key_is_refused(tmp_path, content):
    FingerprintKey.load()
    (tmp_path / "home" / "fingerprint.key").write_bytes(content)
    with pytest.raises(ValueError, match=r"fingerprint.key is damaged: restore it"):
        FingerprintKey.load()


def test_a_key_open_to_others_is_refused(tmp_path):
    FingerprintKey.load()
    (tmp_path / "home" / "fingerprint.key").chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        FingerprintKey.load()


def test_a_home_that_is_a_file_is_explained(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DPOPT_HOME", str(tmp_path / "file" / "below"))
    with pytest.raises(OSError, match="set DPOPT_HOME"):
        FingerprintKey.load()


def test_where_the_key_lies(tmp_path, monkeypatch):
    monkeypatch.delenv("DPOPT_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert home() == tmp_path / "dpopt"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home() == tmp_path / ".local/share/dpopt"


def test_processes_that_make_the_key_at_once_get_one(tmp_path):
    script = "from dpopt.data.fingerprint import FingerprintKey; print(FingerprintKey.load().key_id)"
    environment = {**os.environ, "DPOPT_HOME": str(tmp_path / "shared"), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE) for _ in range(3)
    ]
    found = {process.communicate()[0] for process in processes}
    assert len(found) == 1 and found != {b""}


def test_a_key_made_meanwhile_counts(tmp_path, monkeypatch):
    """The other process finishes between our look for the key and our attempt to put one there."""
    real = os.link
    theirs = bytes(range(1, 33))

    def link(source, target):
        with open(os.open(target, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.write(theirs)
        real(source, target)

    monkeypatch.setattr(os, "link", link)
    assert FingerprintKey.load().material == theirs
    assert len(list((tmp_path / "home").iterdir())) == 1


def test_every_file_of_a_folder_counts(tmp_path, monkeypatch):
    """All 140 of them: a sample of 64 would miss most."""
    settled(monkeypatch)
    root = make_folder(tmp_path / "images", count=70)
    reference = folder_source(root).fingerprint()
    for path in list(root.rglob("*.bmp"))[::23]:
        content, about = path.read_bytes(), path.stat()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # one byte, the same size
        assert folder_source(root).fingerprint() != reference
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))  # as `cp -p` leaves it
        assert folder_source(root).fingerprint() != reference
        path.write_bytes(content)  # at another time
        assert {folder_source(root).fingerprint(kind) for kind in ("content", "quick")} == {reference}


def test_a_moved_folder_is_the_same_data_and_another_class_is_not(tmp_path):
    root = make_folder(tmp_path / "images")
    reference = folder_source(root).fingerprint()
    moved = root.rename(tmp_path / "moved")
    assert folder_source(moved).fingerprint() == reference
    (moved / "cat/4.bmp").rename(moved / "dog/9.bmp")
    assert folder_source(moved).fingerprint() != reference


def test_files_are_read_once(tmp_path, monkeypatch):
    settled(monkeypatch)
    root = make_folder(tmp_path / "images")
    reads = []
    real = image_files._inspect
    monkeypatch.setattr(image_files, "_inspect", lambda path: reads.append(path) or real(path))
    first = folder_source(root).fingerprint()
    assert len(reads) == 10 and folder_source(root).fingerprint() == first and len(reads) == 10
    path = next(root.rglob("*.bmp"))
    os.utime(path, ns=(0, 0))
    assert folder_source(root).fingerprint() == first and reads[10:] == [str(path)]
    (cache,) = (tmp_path / "home" / "image_digests").iterdir()
    assert cache.stat().st_mode & 0o777 == 0o600
    content = cache.read_bytes()
    for path in root.rglob("*.bmp"):  # neither names nor bare hashes of private files
        assert str(path).encode() not in content and bytes.fromhex(file_fingerprint(path)) not in content
    (tmp_path / "home" / "fingerprint.key").unlink()
    assert folder_source(root).fingerprint() == first and len(reads) == 21  # another key finds nothing


def test_a_file_that_may_still_change_is_not_kept(tmp_path, monkeypatch):
    reads = []
    real = image_files._inspect
    monkeypatch.setattr(image_files, "_inspect", lambda path: reads.append(path) or real(path))
    root = make_folder(tmp_path / "images")
    for _ in range(2):
        folder_source(root).fingerprint()
    assert len(reads) == 20


def test_damaged_images_are_named_and_repair_is_seen(tmp_path, monkeypatch):
    settled(monkeypatch)
    root = make_folder(tmp_path / "images", suffix="png")
    path = root / "dog/3.png"
    good = path.read_bytes()
    for damaged in (good[: len(good) // 2], b"", b"no image"):
        path.write_bytes(damaged)
        with pytest.raises(OSError, match=rf"{path} cannot be read as an image .*: repair or replace it") as caught:
            folder_source(root).fingerprint()
        assert "\n" not in str(caught.value) and "BytesIO" not in str(caught.value)
    (root / "cat/0.png").write_bytes(b"")
    with pytest.raises(OSError, match=r"cat/0.png .*; 1 more cannot be read either"):
        folder_source(root).fingerprint()
    path.write_bytes(good)
    (root / "cat/0.png").write_bytes(good)
    folder_source(root).fingerprint()


class Numbers:
    """Items of a list, counted as they are fetched."""

    def __init__(self, values):
        self.values, self.fetched = values, 0

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        self.fetched += 1
        return torch.tensor([self.values[index]]), index % 3


def test_every_item_of_a_dataset_counts():
    values = [float(i) for i in range(200)]
    reference = as_source(Numbers(values)).fingerprint()
    assert as_source(Numbers(list(values))).fingerprint() == reference
    assert MapSource(Numbers(values), CPU, 2).fingerprint() == reference  # by worker processes
    for index in (1, 50, 199):
        other = [*values]
        other[index] += 0.5
        assert as_source(Numbers(other)).fingerprint() != reference
        assert as_source(Numbers(other)).fingerprint("quick") != reference
    source = as_source(Numbers(values))
    source.fingerprint(), source.contents(), source.subset(torch.arange(9)).fingerprint()
    assert source.dataset.fetched == 201  # and one for the shape


def test_a_declared_fingerprint_is_enough_for_quick_alone():
    class Declared(Numbers):
        def fingerprint(self):
            return "version 1"

    data, other = Declared([0.0, 1.0]), Declared([0.0, 2.0])
    assert as_source(data).fingerprint("quick") == as_source(other).fingerprint("quick") and data.fetched == 0
    assert as_source(data).fingerprint("content") != as_source(other).fingerprint("content")


@pytest.mark.parametrize("make", [lambda x: TensorSource(x, torch.zeros(len(x))), lambda x: as_source(Numbers(x))])
def test_a_subset_keeps_the_fingerprint_of_the_whole(make):
    values = torch.arange(6.0)
    other = values.clone()
    other[5] = 9.0
    chosen = torch.tensor([0, 1, 2])
    reference = make(values).subset(chosen).fingerprint()
    assert make(values.clone()).subset(chosen).fingerprint() == reference
    assert make(other).subset(chosen).fingerprint() != reference  # an example that is not in it
    assert make(values).subset(torch.tensor([0, 1])).fingerprint() != reference
    assert make(values).fingerprint() != reference


def test_fingerprints_of_weights(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    assert file_fingerprint(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    reference = module_fingerprint(model)
    assert module_fingerprint(model) == reference
    model[1].running_mean[0] += 1
    assert module_fingerprint(model) != reference


def test_progress_is_said_in_lines_where_there_is_no_terminal(monkeypatch, capsys):
    assert list(progress(range(3), 3, "reading")) == [0, 1, 2] and capsys.readouterr().err == ""
    monkeypatch.setattr("dpopt.data.fingerprint._SILENT", -1.0)
    monkeypatch.setattr("dpopt.data.fingerprint._BETWEEN", -1.0)
    assert list(progress(range(1000, 1002), 2, "reading")) == [1000, 1001]
    assert capsys.readouterr().err.splitlines()[:2] == ["reading: 1 of 2", "reading: 2 of 2"]


def test_settings_of_a_tensor_source_count():
    source = TensorSource(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3), (0.0,), (1.0,))
    changed = [source, replace(source, crop=1), replace(source, flip=True), replace(source, image_size=4)]
    assert len({one.fingerprint() for one in changed}) == 4
