"""Hold the random streams against the laws they should follow: a battery on the words, tails and moments of 10⁹ draws.

    python scripts/check_noise.py [draws]

Prints Markdown. The battery follows NIST SP 800-22 (frequency, block frequency, runs, spectral, serial) with counts of
bytes and of 16-bit words, autocorrelations and birthday spacings, on ten streams. All tests together pass if the
smallest of their n p-values is above 0.01/n, which is declared here, before any of them is computed.
"""

import math
import sys
from collections.abc import Iterator

import numpy as np
import torch
from scipy import stats

from dpopt.rng import CHUNK, RandomKey

BOUNDS = (3.0, 4.0, 4.5, 5.0, 5.5, 6.0)
RADII = (2.0**-12, 2.0**-11, 2.0**-10, 2.0**-9)  # one transform in float32 is never closer than the second
LEVEL = 0.01
STREAMS = 10
KEY = RandomKey.from_seed(0, "check")


def two_sided(z: float) -> float:
    """Return the p-value of a standard Gaussian statistic."""
    return math.erfc(abs(z) / math.sqrt(2))


def uniform_counts(values: np.ndarray, kinds: int) -> float:
    """Return the p-value of equal frequencies."""
    return float(stats.chisquare(np.bincount(values, minlength=kinds)).pvalue)


def battery(raw: np.ndarray) -> Iterator[tuple[str, float]]:
    """Yield the name and p-value of each test on a stream of bytes."""
    bits = np.unpackbits(raw)
    n, ones = len(bits), int(bits.sum())
    yield "frequency", two_sided((2 * ones - n) / math.sqrt(n))
    blocks = bits.reshape(-1, 128).mean(1, dtype=np.float64)
    yield "block frequency", float(stats.chi2.sf(4 * 128 * np.square(blocks - 0.5).sum(), len(blocks)))
    share, runs = ones / n, 1 + int((bits[1:] != bits[:-1]).sum())
    spread = 2 * share * (1 - share) * math.sqrt(n)
    yield "runs", two_sided((runs - 2 * n * share * (1 - share)) / spread)
    for lag in (1, 8, 32, 512):
        agree = int((bits[lag:] == bits[:-lag]).sum())
        yield f"autocorrelation, lag {lag}", two_sided((2 * agree - (n - lag)) / math.sqrt(n - lag))
    some = 2.0 * bits[: 1 << 20] - 1
    below = int((np.abs(np.fft.rfft(some))[1 : len(some) // 2] < math.sqrt(len(some) * math.log(20))).sum())
    expected = 0.95 * (len(some) // 2 - 1)
    yield "spectral", two_sided((below - expected) / math.sqrt(len(some) * 0.95 * 0.05 / 4))
    yield "bytes", uniform_counts(raw, 256)
    yield "words of 16 bits", uniform_counts(raw.view("<u2"), 1 << 16)
    pairs = raw[:-1].astype(np.uint16) << 8 | raw[1:]
    yield (
        "serial, pairs of bytes",
        float(stats.chi2.sf(psi(pairs, 1 << 16, len(raw)) - psi(raw, 256, len(raw)), (1 << 16) - 256)),
    )
    yield "birthday spacings", birthday_spacings(raw.view("<u4"))


def psi(values: np.ndarray, kinds: int, n: int) -> float:
    """Return the statistic of overlapping patterns of NIST's serial test."""
    counts = np.bincount(values, minlength=kinds).astype(np.float64)
    return float(np.square(counts).sum() * kinds / n - n)


def birthday_spacings(words: np.ndarray, birthdays: int = 4096, days: int = 1 << 32) -> float:
    """Return the p-value of the number of equal spacings of birthdays, a Poisson variable (Marsaglia)."""
    groups = np.sort(words[: len(words) // birthdays * birthdays].reshape(-1, birthdays), axis=1).astype(np.int64)
    spacings = np.sort(np.diff(groups, axis=1), axis=1)
    equal = int((spacings[:, 1:] == spacings[:, :-1]).sum())
    mean = len(groups) * birthdays**3 / (4 * days)
    tail = min(stats.poisson.cdf(equal, mean), stats.poisson.sf(equal - 1, mean))
    return float(min(1.0, 2 * tail))


def print_battery() -> None:
    """Print the smallest p-value of every test over the streams, and whether all pass."""
    found: dict[str, list[float]] = {}
    for stream in range(STREAMS):
        raw = np.frombuffer(KEY.keystream(0, 1 << 24, "battery", stream), np.uint8)
        for name, p in battery(raw):
            found.setdefault(name, []).append(p)
    for dtype in (torch.float32, torch.float64):
        for stream in range(20):
            p = float(stats.kstest(KEY.normal(200_000, "ks", stream, dtype=dtype).numpy(), "norm").pvalue)
            found.setdefault(f"Kolmogorov–Smirnov, {str(dtype)[6:]}", []).append(p)
    count = sum(map(len, found.values()))
    print("| test | streams | smallest p-value |\n|---|---:|---:|")
    for name, values in found.items():
        print(f"| {name} | {len(values)} | {min(values):.4f} |")
    smallest = min(p for values in found.values() for p in values)
    verdict = "pass" if smallest > LEVEL / count else "FAIL"
    print(f"\n{count} p-values, the smallest {smallest:.2g}; above {LEVEL}/{count} = {LEVEL / count:.2g}: {verdict}\n")


def print_draws(count: int) -> None:
    """Print tails, pairs near the origin and moments of `count` draws of one stream."""
    counts, near, pairs = dict.fromkeys(BOUNDS, 0), dict.fromkeys(RADII, 0), 0
    sums = torch.zeros(4, dtype=torch.float64)
    for piece in KEY.gaussians(count, "noise", 0):
        size = piece.abs()
        if len(piece) == CHUNK:
            squares = piece[: CHUNK // 2].square() + piece[CHUNK // 2 :].square()
            squares = squares[squares < RADII[-1] ** 2]
            pairs += CHUNK // 2
            for radius in RADII:
                near[radius] += int((squares < radius**2).sum())
        large = size[size > BOUNDS[0]]
        for bound in BOUNDS:
            counts[bound] += int((large > bound).sum())
        square = piece.square()
        for power, values in enumerate((piece, square, square * piece, square * square)):
            sums[power] += values.sum(dtype=torch.float64)
    print(f"{count:,} draws\n\n| beyond | found | expected | 99.9% bounds | inside |\n|---|---:|---:|---|---|")
    for bound in BOUNDS:
        expected = count * math.erfc(bound / math.sqrt(2))
        low, high = stats.poisson.ppf((5e-4, 1 - 5e-4), expected)
        inside = "yes" if low <= counts[bound] <= high else "NO"
        print(f"| {bound} σ | {counts[bound]:,} | {expected:,.1f} | {low:,.0f} to {high:,.0f} | {inside} |")
    print(f"\n{pairs:,} pairs that share their words\n")
    print("| closer to the origin than | found | expected | 99.9% bounds | inside |\n|---|---:|---:|---|---|")
    for radius in RADII:
        expected = -pairs * math.expm1(-(radius**2) / 2)
        low, high = stats.poisson.ppf((5e-4, 1 - 5e-4), expected)
        inside = "yes" if low <= near[radius] <= high else "NO"
        name = f"2^{round(math.log2(radius))} σ"
        print(f"| {name} | {near[radius]:,} | {expected:,.1f} | {low:,.0f} to {high:,.0f} | {inside} |")
    print("\n| moment | found − expected, in standard errors |\n|---|---:|")
    for power, (expected, variance) in enumerate(((0, 1), (1, 2), (0, 15), (3, 96)), start=1):
        error = (float(sums[power - 1]) / count - expected) / math.sqrt(variance / count)
        print(f"| {power} | {error:+.2f} |")


if __name__ == "__main__":
    print_battery()
    print_draws(int(float(sys.argv[1])) if len(sys.argv) > 1 else 10**9)
