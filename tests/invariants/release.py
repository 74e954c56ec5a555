"""What is released gives away no more than the noise allows: attacks on its floating-point form are at chance.

For each check there are mutants, small wrong versions of the library, under which the attack succeeds.
"""

import numpy as np
import torch

from dpopt import rng
from dpopt.privacy import noise
from dpopt.rng import RandomKey

TRIALS = 1000


def advantage(detected: dict[bool, list[bool]]) -> float:
    """Power less false alarms."""
    return float(np.mean(detected[True]) - np.mean(detected[False]))


def is_float32(values: np.ndarray) -> np.ndarray:
    """Whether values lie within a fiftieth of the spacing of a float32."""
    nearest = values.astype(np.float32)
    return np.abs(values - nearest) <= 0.02 * np.spacing(np.abs(nearest)).astype(np.float64)


def check_a_float64_sum_stays_hidden(size=16, std=5.0):
    """The residual of the right guess is what the noise can be, of a wrong one it is not."""
    found = {}
    for present in (True, False):
        total = torch.full((size,), present / 3 / size**0.5, dtype=torch.float64)
        released = [
            noise.add_noise(total.clone(), std, 256.0, RandomKey.from_os(), 0).numpy() * 256 for _ in range(TRIALS)
        ]
        found[present] = [not is_float32(r / std).all() for r in released]
    assert advantage(found) <= 0.02


def reachable(released: np.ndarray, std: float) -> np.ndarray:
    """Whether some float32 z near released/std gives exactly this float32."""
    near = (released / std).astype(np.float32)
    reached = np.zeros(len(released), dtype=bool)
    for direction in (-np.inf, np.inf):
        z = near.copy()
        for _ in range(3):
            reached |= (np.float32(std) * z).astype(np.float32) == released.astype(np.float32)
            z = np.nextafter(z, np.float32(direction))
    return reached


def check_a_float32_sum_stays_hidden(size=4000, std=5.0):
    found = {}
    for present in (True, False):
        total = torch.full((size,), present / 3, dtype=torch.float32)
        released = [
            noise.add_noise(total.clone(), std, 256.0, RandomKey.from_os(), 0).numpy() * 256 for _ in range(TRIALS)
        ]
        found[present] = [bool((~reachable(r, std)).any()) for r in released]
    assert advantage(found) <= 0.02


def check_the_count_stays_hidden(std=12.7):
    """(released − k/2)/σ_b is a float32 for the right k only, if the noise is one."""
    right = 0
    for trial in range(TRIALS):
        count = (trial % 40) / 2
        released = noise.add_count_noise(count, std, RandomKey.from_os(), 0)
        guesses = np.arange(-200, 201) / 2
        z = (released - guesses) / std
        fitting = guesses[np.abs(z - z.astype(np.float32)) < 1e-14]
        right += len(fitting) == 1 and fitting[0] == count
    assert right / TRIALS <= 0.02


def check_noise_ignores_the_default_dtype():
    """Every tensor of the mechanism states its dtype."""
    before = torch.get_default_dtype()
    try:
        for default in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(default)
            draws = RandomKey.from_seed(0).normal(200_000, "noise", 0)
            assert draws.dtype == torch.float32 and len(draws.unique()) > 190_000
            released = noise.add_noise(torch.zeros(200_000, dtype=torch.float32), 1.0, 1.0, RandomKey.from_seed(0), 0)
            assert released.dtype == torch.float32 and len(released.unique()) > 20_000
    finally:
        torch.set_default_dtype(before)


def check_radii_have_more_than_32_bits():
    """The smallest words give 10.6 standard deviations; 32 bits would end at 9.5."""

    class Zeros:
        def read_into(self, start, out, size):
            out[:size] = bytes(size)

    assert float(rng._Float32Pairs(Zeros()).draws(0, 0, rng.CHUNK).abs().max()) > 10.6
    assert float(rng._Float64Pairs(Zeros()).draws(0, 0, rng.CHUNK).abs().max()) > 12.2


def check_no_pair_has_a_hole(chunks=1200, hole=2.0**-11):
    """As many pairs lie near the origin, closer than one transform in float32 comes to it, as there should be."""
    near, half = 0, rng.CHUNK // 2
    for piece in RandomKey.from_seed(0).gaussians(chunks * rng.CHUNK, "noise", 0):
        near += int((piece[:half].square() + piece[half:].square() < 0.999 * hole**2).sum())
    expected = chunks * half * hole**2 / 2
    assert expected > 9 and expected / 3 < near < 3 * expected


def released_as_it_is(patch):
    """As in earlier versions: float32 noise, whatever the sum, and no grid."""

    def add_noise(total, std, divisor, key, step, start=0):
        return total.add_(key.normal(len(total), "noise", step).to(total.dtype), alpha=std).div_(divisor)

    patch.setattr(noise, "add_noise", add_noise)
    patch.setattr(noise, "add_count_noise", lambda count, std, key, step: count + std * float(key.normal(1, "count")))


def noise_in_the_default_dtype(patch, real=RandomKey.gaussians):
    def draw(self, *arguments, **options):
        return (piece.to(torch.get_default_dtype()).float() for piece in real(self, *arguments, **options))

    patch.setattr(RandomKey, "gaussians", draw)


def radii_of_32_bits(patch):
    patch.setattr(rng._Float32Pairs, "radius_bits", 33)
    patch.setattr(rng._Float64Pairs, "radius_bits", 33)


def one_transform(patch, real=rng._Float32Pairs.transform):
    """As in version 2: the second transform adds nothing."""
    calls = []

    def transform(self, at):
        radius, angle = real(self, at)
        calls.append(None)
        return radius * (2**0.5 if len(calls) % 2 else 0), angle

    patch.setattr(rng._Float32Pairs, "transform", transform)


MUTANTS = {
    check_a_float64_sum_stays_hidden: [released_as_it_is],
    check_a_float32_sum_stays_hidden: [released_as_it_is],
    check_the_count_stays_hidden: [released_as_it_is],
    check_noise_ignores_the_default_dtype: [noise_in_the_default_dtype],
    check_radii_have_more_than_32_bits: [radii_of_32_bits],
    check_no_pair_has_a_hole: [one_transform],
}
