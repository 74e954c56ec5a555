"""Several ranks are one mechanism: one batch, one sum, one noise, one key. Each mutant is a mistake that peers make."""

import ranks_at_work as work
import spawned
import torch
from spawned import at_ranks


def check_ranks_release_what_one_process_does():
    found = at_ranks(work.plain_steps, 1, 3)
    for number, one in enumerate(found[1][0]):
        several = [answers[number] for answers in found[3]]
        drawn = torch.cat([step["indices"] for step in several]).sort().values
        assert torch.equal(drawn, one["indices"])
        for step in several:
            assert torch.equal(step["gradient"], several[0]["gradient"])
            torch.testing.assert_close(step["gradient"], one["gradient"], rtol=1e-9, atol=1e-12)


def check_ranks_augment_as_one_process_does():
    found = at_ranks(work.augmented_steps, 1, 2)
    for number, one in enumerate(found[1][0]):
        torch.testing.assert_close(found[2][0][number]["sum"], one["sum"], rtol=1e-9, atol=1e-12)


def check_ranks_share_one_secret_key():
    first, second = at_ranks(work.secret_steps, 2)[2]
    assert torch.equal(first, second)


def check_ranks_that_differ_are_refused():
    told = at_ranks(work.different_ranks, 2)[2]
    assert set(told[0]) == set(told[1]) == {"secret key", "plan", "data", "model", "clip rule"}


def _in_every_process(wrong):
    def mutant(patch):
        patch.setattr(spawned, "BROKEN", [wrong])

    mutant.__name__ = wrong.__name__
    return mutant


MUTANTS = {
    check_ranks_release_what_one_process_does: [
        _in_every_process(work.noise_before_the_reduction),
        _in_every_process(work.the_same_local_mask),
        _in_every_process(work.whole_batches_on_all_ranks),
        _in_every_process(work.a_divisor_of_local_counts),
        _in_every_process(work.averaged_sums),
        _in_every_process(work.a_rank_that_skips_its_empty_batch),
    ],
    check_ranks_augment_as_one_process_does: [_in_every_process(work.augmentation_by_place_in_the_share)],
    check_ranks_share_one_secret_key: [_in_every_process(work.a_secret_key_per_rank)],
    check_ranks_that_differ_are_refused: [
        _in_every_process(work.ranks_that_compare_nothing),
        _in_every_process(work.ranks_that_compare_names_alone),
    ],
}
