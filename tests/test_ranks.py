"""Several ranks release what one process releases."""

from functools import cache

import pytest
import ranks_at_work as work
import torch
from spawned import at_ranks

WORLDS = (1, 2, 3)


@cache
def found():
    return at_ranks(work.steps_of_all_kinds, *WORLDS)


@pytest.mark.parametrize("kind", work.KINDS)
@pytest.mark.parametrize("precision, tolerance", [("float64", 1e-12), ("float32", 1e-6)])
@pytest.mark.parametrize("world", WORLDS[1:])
def test_ranks_release_what_one_process_does(kind, precision, tolerance, world):
    (alone,), together = found()[1], found()[world]
    if kind == "zeroth order" and precision == "float32":
        tolerance = 4 * 2**-23 / 2e-3  # losses near 1 that differ in their last bit, over twice the smoothing
    for number, one in enumerate(alone[kind, precision]):
        several = [answers[kind, precision][number] for answers in together]
        drawn = torch.cat([step["indices"] for step in several]).sort().values
        assert torch.equal(drawn, one["indices"])  # the shares are the batch, each example once
        assert one.get("epsilon") == several[0].get("epsilon")
        for step in several:
            assert torch.equal(step["gradient"], several[0]["gradient"])  # the same bits on every rank
            assert work.close(step["sum"], one["sum"], tolerance)
            assert step["clip"] == pytest.approx(one["clip"], rel=1e-9)
            assert step["statistics"] == pytest.approx(one["statistics"], rel=1e-4)
        if precision == "float64" and kind != "least squares":
            torch.testing.assert_close(several[0]["gradient"], one["gradient"], rtol=1e-9, atol=1e-12)


def test_in_fp32_a_release_differs_by_at_most_one_cell_of_the_grid():
    (alone,), together = found()[1], found()[3]
    for kind in ("plain", "empty", "small", "views"):
        cell = alone[kind, "float32"][-1]["cell"]
        for one, step in zip(alone[kind, "float32"], together[0][kind, "float32"], strict=True):
            off = (one["gradient"] - step["gradient"]).abs() / cell
            assert float(off.max()) <= 1.01 and float((off > 0.5).float().mean()) < 0.02


def test_the_problems_are_what_they_are_for():
    shares = [[len(step["indices"]) for step in answers["empty", "float64"]] for answers in found()[3]]
    assert [0, 0, 0] in list(map(list, zip(*shares, strict=True)))  # an empty batch
    assert any(min(sizes) == 0 < max(sizes) for sizes in zip(*shares, strict=True))  # smaller than the world
    pieces = [[-(-len(step["indices"]) // 2) for step in answers["plain", "float64"]] for answers in found()[2]]
    assert pieces[0] != pieces[1]  # uneven numbers of micro-batches


def test_a_rank_that_differs_is_named_on_every_rank():
    told = at_ranks(work.different_ranks, 3)[3]
    assert told[0] == told[1] == told[2] and set(told[0]) == {"secret key", "plan", "data", "model", "clip rule"}
    for what, sentence in told[0].items():
        assert sentence.startswith(f"rank 2 has another {what} than rank 0")


def test_a_wish_to_stop_is_known_to_all_after_the_same_step():
    assert at_ranks(work.wishes, 2)[2] == [[False, True, False, False]] * 2


def test_one_all_reduce_per_step():
    assert at_ranks(work.counted_collectives, 2)[2] == [[1, 1, 1, 1]] * 2


def test_sharded_and_wrapped_models_are_refused():
    for wrapped, sharded in at_ranks(work.refused_models, 2)[2]:
        assert "DistributedDataParallel averages gradients that are not clipped yet" in wrapped
        assert "'0.weight' is sharded over processes (FSDP2)" in sharded


def test_the_loop_of_the_documentation():
    first, second = at_ranks(work.documented_loop, 2)[2]
    assert torch.equal(first, second)
