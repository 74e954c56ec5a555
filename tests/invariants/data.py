"""Invariants of data: no two datasets share noise, no example decides over another, every step sees one data."""

import tempfile
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_plan
from PIL import Image

import dpopt
from dpopt.data import holdout, image_files, items, map_source
from dpopt.data.fingerprint import FingerprintKey, combine, tensor_digest
from dpopt.data.holdout import split_holdout
from dpopt.data.sources import MapSource, TensorSource, as_source
from dpopt.privacy import private_gradient, sampling
from dpopt.privacy.zeroth_order import ZerothOrder
from dpopt.rng import RandomKey

clients = import_module("dpopt.data.clients")  # dpopt.data.clients is the function

CPU = torch.device("cpu")


class Rows:
    """A map-style Dataset over the rows of a tensor."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index], 0


def rows(size=150):
    return torch.randn(size, 3, generator=torch.Generator().manual_seed(0))


def changed(at, size=150):
    other = rows(size)
    other[at, 2] = torch.nextafter(other[at, 2], torch.tensor(9.0))
    return other


def noise_of(source):
    """The noise that a run on this data adds under research randomness, at a fixed seed and configuration."""
    return RandomKey.from_seed(0, "run", source.fingerprint("content")).normal(9, "noise", 0)


# No two neighboring datasets share noise.


def check_neighboring_datasets_share_no_noise():
    for make in (lambda x: TensorSource(x, torch.zeros(len(x))), lambda x: as_source(Rows(x))):
        assert torch.equal(noise_of(make(rows())), noise_of(make(rows())))
        for other in (changed(0), changed(51), changed(149), rows()[:-1]):
            assert not torch.equal(noise_of(make(rows())), noise_of(make(other)))
        parts = [make(x).subset(torch.arange(100)) for x in (rows(), changed(149))]
        assert not torch.equal(*map(noise_of, parts))


def check_neighboring_folders_share_no_noise():
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import ToTensor

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_files, "_SETTLED", -1.0)
        generator = np.random.default_rng(0)
        for name in ("a", "b"):
            (Path(folder) / name).mkdir()
            for index in range(60):
                pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(Path(folder) / name / f"{index:02}.bmp")
        before = noise_of(MapSource(ImageFolder(folder, ToTensor()), CPU))
        for name in ("a/02.bmp", "a/51.bmp", "b/00.bmp"):
            Image.fromarray(np.full((4, 4, 3), 255, dtype=np.uint8)).save(Path(folder) / name)  # the same size
            after = noise_of(MapSource(ImageFolder(folder, ToTensor()), CPU))
            assert not torch.equal(before, after)
            before = after


def fingerprint_of_64_items(patch):
    def fingerprint(self, kind="content"):
        chosen = np.linspace(0, len(self) - 1, 64).astype(int)
        return combine(str(len(self)), *(tensor_digest(self.dataset[int(i)][0]) for i in chosen))

    patch.setattr(MapSource, "fingerprint", fingerprint)


def fingerprint_of_tensors_rounded(patch):
    patch.setattr("dpopt.data.sources.tensor_digest", lambda tensor: tensor_digest(tensor.half()))


def fingerprint_of_the_subset_alone(patch):
    def subset(self, indices, public_size=None):
        return MapSource(Rows(self.dataset.rows[indices]), CPU, announced=public_size)

    patch.setattr(MapSource, "subset", subset)


def folders_by_name_and_size(patch):
    patch.setattr(
        map_source, "image_digests", lambda root, paths: [str(Path(p).stat().st_size).encode() for p in paths]
    )


def digests_kept_by_name_alone(patch):
    patch.setattr(image_files._Cache, "seal", lambda self, path: self.key.seal(path.encode()))


# A hold-out tells nothing of one example through another.


def check_removing_an_example_moves_no_other():
    inputs = rows(400)

    def kept(x):
        train, _ = split_holdout(TensorSource(x, torch.zeros(len(x))), 0.2, 0)
        return {tuple(row.tolist()) for row in train.inputs}

    whole = kept(inputs)
    for gone in (0, 17, 399):
        rest = torch.cat([inputs[:gone], inputs[gone + 1 :]])
        assert kept(rest) == whole - {tuple(inputs[gone].tolist())}
    doubled = TensorSource(inputs.repeat(2, 1), torch.zeros(800))
    train, held_out = split_holdout(doubled, 0.2, 0)
    assert not {tuple(r.tolist()) for r in train.inputs} & {tuple(r.tolist()) for r in held_out.inputs}


def check_the_sizes_of_a_holdout_are_public():
    """q and the divisor qN go by round(hN), whichever examples there are; every one of those is sampled with q."""
    for seed in range(3):
        train, _ = split_holdout(TensorSource(rows(400), torch.zeros(400)), 0.2, seed)
        plan = make_plan(size=320, batch=160, steps=60)
        try:
            batches = [batch.indices for batch in dpopt.poisson_batches(train, plan)]
        except IndexError as error:
            raise AssertionError("an example that is not there was drawn") from error
        counts = torch.cat(batches).bincount(minlength=len(train))
        assert len(counts) == len(train) and abs(float(counts.double().mean()) / 60 - 0.5) < 0.02
        assert counts.min() > 0


def holdout_by_position(patch):
    def coins(contents, fraction, seed):
        order = torch.argsort(RandomKey.from_seed(seed).uniform(len(contents), "split"))
        out = torch.zeros(len(contents), dtype=torch.bool)
        out[order[: round(fraction * len(contents))]] = True
        return out

    patch.setattr(holdout, "_coins", coins)


def coins_by_index(patch):
    patch.setattr(holdout, "_coins", lambda c, f, seed: RandomKey.from_seed(seed).uniform(len(c), "coin") < f)


def the_realized_size_for_the_public_one(patch):
    patch.setattr(TensorSource, "public_size", property(lambda self: len(self)))


def coins_for_as_many_as_announced(patch):
    real = sampling.sample_indices
    patch.setattr(sampling, "sample_indices", lambda plan, step, *_: real(plan, step))


# An item is what it was when the step is replayed, and the key in its worker process draws no noise.


def check_items_are_replayable():
    class Own(Rows):
        def __getitem__(self, index):
            return self.rows[index] + np.random.default_rng().normal(), 0

    class Worker(Rows):
        def __getitem__(self, index):
            worker = torch.utils.data.get_worker_info()
            return self.rows[index] + (0 if worker is None else worker.id), 0

    for dataset, workers in ((Own(rows()), 0), (Worker(rows()), 2)):
        with pytest.raises(ValueError, match="keyed_item"):
            MapSource(dataset, CPU, workers).check(items.Expected(), "training")


def check_workers_get_no_key_of_noise():
    key = RandomKey.from_os()
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        real = map_source._KeyedViews.__init__
        patch.setattr(
            map_source._KeyedViews, "__init__", lambda self, d, k, v, e: seen.append(k) or real(self, d, k, v, e)
        )
        next(as_source(Rows(rows())).views([(0, torch.arange(3))], key, 1, 4))
    assert len(seen) == 1 and not seen[0].secure
    assert not torch.equal(seen[0].normal(9, "noise", 0), key.normal(9, "noise", 0))


def items_fetched_once(patch):
    patch.setattr(items, "tensor_digest", lambda tensor: b"")


def workers_unchecked(patch):
    patch.setattr(MapSource, "_check_workers", lambda self: None)


def workers_with_the_whole_key(patch):
    patch.setattr(RandomKey, "for_workers", lambda self, label: RandomKey(self.material))


# A client is protected as a whole, so that no client decides which examples of another one are taken.


def check_no_client_decides_what_another_one_keeps():
    users, inputs = torch.arange(600) % 20, rows(600)
    kept = []
    for there in (users >= 0, users > 0):
        names = [f"user{int(user):02}" for user in users[there]]
        source = TensorSource(inputs[there], torch.zeros(int(there.sum()), dtype=torch.long), groups=names)
        spec = dpopt.data.DataSpec("people", 1, 1, (3,), lambda *_, source=source: (source, source))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dpopt.data, "people", lambda spec=spec: spec, raising=False)
            size = len(set(names))
            made = clients.clients("dpopt.data.people", clients=size, per_client=5, alpha=None)
            train, _ = made.load(Path(), CPU, 0)
        kept.append({inputs[there][row].numpy().tobytes() for row in train.clients})
    assert len(kept[0]) == 20 and len(kept[0] - kept[1]) == 1


def examples_of_a_client_by_position(patch):
    patch.setattr(
        clients,
        "_by_content",
        lambda train, seed: torch.argsort(RandomKey.from_seed(seed).uniform(len(train), "order")),
    )


# A micro-batch of texts is as long as its longest one, which must change nothing for the others.


class Words(torch.nn.Module):
    """The mean over as many words as there are, or over the width."""

    def __init__(self, counted):
        super().__init__()
        self.counted, self.table, self.head = counted, torch.nn.Embedding(30, 8), torch.nn.Linear(8, 2)

    def forward(self, tokens):
        there = (tokens >= 0)[..., None]
        total = self.table(tokens.clamp(min=0)).where(there, 0.0).sum(1)
        return self.head(total / (there.sum(1).clamp(min=1) if self.counted else tokens.shape[1]))


def check_no_text_decides_how_long_another_one_is():
    tokens = torch.randint(0, 30, (16, 64), generator=torch.Generator().manual_seed(0))
    tokens[torch.arange(64) >= torch.arange(4, 20)[:, None]] = -1
    source = TensorSource(tokens, torch.arange(16) % 2, trimmed=True)
    for estimator in (dpopt.PrivateGradient, ZerothOrder):
        for counted in (True, False):
            plan = make_plan(1.0, size=16, batch=8, steps=1)
            private = estimator(Words(counted), torch.nn.functional.cross_entropy, plan, dpopt.clipping.Flat(1.0))
            with nullcontext() if counted else pytest.raises(ValueError, match="depends on the padding behind it"):
                for batch in dpopt.poisson_batches(source, plan, micro_batch=4):
                    private.backward(batch)


def padding_unchecked(patch):
    patch.setattr(private_gradient, "check_padding", lambda model, tokens: None)


# What is written down about private data cannot be tested against a guess.


def check_written_fingerprints_need_the_key():
    fingerprint = TensorSource(rows(), torch.zeros(150)).fingerprint()
    keys = FingerprintKey(bytes([1] * 32)), FingerprintKey(bytes([2] * 32))
    assert len({fingerprint, *(key.mac(fingerprint) for key in keys)}) == 3
    assert keys[0].mac(fingerprint) == keys[0].mac(fingerprint) and keys[0].key_id != keys[1].key_id
    assert all(part not in key.mac(fingerprint) + key.key_id for key in keys for part in (key.material.hex(),))


def mac_without_the_key(patch):
    patch.setattr(FingerprintKey, "mac", lambda self, fingerprint: combine("mac", fingerprint))


def mac_is_the_fingerprint(patch):
    patch.setattr(FingerprintKey, "mac", lambda self, fingerprint: fingerprint)


MUTANTS = {
    check_neighboring_datasets_share_no_noise: [
        fingerprint_of_64_items,
        fingerprint_of_tensors_rounded,
        fingerprint_of_the_subset_alone,
    ],
    check_neighboring_folders_share_no_noise: [
        fingerprint_of_64_items,
        folders_by_name_and_size,
        digests_kept_by_name_alone,
    ],
    check_removing_an_example_moves_no_other: [holdout_by_position, coins_by_index],
    check_the_sizes_of_a_holdout_are_public: [the_realized_size_for_the_public_one, coins_for_as_many_as_announced],
    check_items_are_replayable: [items_fetched_once, workers_unchecked],
    check_workers_get_no_key_of_noise: [workers_with_the_whole_key],
    check_no_client_decides_what_another_one_keeps: [examples_of_a_client_by_position],
    check_no_text_decides_how_long_another_one_is: [padding_unchecked],
    check_written_fingerprints_need_the_key: [mac_without_the_key, mac_is_the_fingerprint],
}
