"""Draw 10⁹ Gaussians as the noise draws them, and hold their distribution and tails against the normal law.

    python scripts/check_noise.py [draws]

Prints a Markdown table: the counts beyond 3 to 6 standard deviations with 99.9 % Poisson bounds, the first four moments
with their standard errors, and Kolmogorov–Smirnov p-values for σ, 2σ/3 and 3σ/2.
"""

import math
import sys

import torch
from scipy import stats

from dpopt.rng import RandomKey

BOUNDS = (3.0, 4.0, 4.5, 5.0, 5.5, 6.0)


def main(count: int) -> None:
    """Check `count` draws of one stream."""
    counts = dict.fromkeys(BOUNDS, 0)
    sums = torch.zeros(4, dtype=torch.float64)
    sample: list[torch.Tensor] = []
    for number, piece in enumerate(RandomKey.from_seed(0, "check").gaussians(count, "noise", 0)):
        size = piece.abs()
        large = size[size > BOUNDS[0]]
        for bound in BOUNDS:
            counts[bound] += int((large > bound).sum())
        square = piece.square()
        for power, values in enumerate((piece, square, square * piece, square * square)):
            sums[power] += values.sum(dtype=torch.float64)
        if number % 100 == 0:
            sample.append(piece[:1000].clone())
    print(f"{count:,} draws\n\n| beyond | found | expected | 99.9 % bounds | inside |\n|---|---:|---:|---|---|")
    for bound in BOUNDS:
        expected = count * math.erfc(bound / math.sqrt(2))
        low, high = stats.poisson.ppf((5e-4, 1 - 5e-4), expected)
        inside = "yes" if low <= counts[bound] <= high else "NO"
        print(f"| {bound} σ | {counts[bound]:,} | {expected:,.1f} | {low:,.0f} to {high:,.0f} | {inside} |")
    print("\n| moment | found − expected, in standard errors |\n|---|---:|")
    for power, (expected, variance) in enumerate(((0, 1), (1, 2), (0, 15), (3, 96)), start=1):
        error = (float(sums[power - 1]) / count - expected) / math.sqrt(variance / count)
        print(f"| {power} | {error:+.2f} |")
    some = torch.cat(sample).numpy()
    found = [f"{stats.kstest(some / factor, 'norm').pvalue:.2g} for {factor:.3g}σ" for factor in (1, 2 / 3, 3 / 2)]
    print(f"\nKolmogorov–Smirnov p-values on {len(some):,} of them: {', '.join(found)}")


if __name__ == "__main__":
    main(int(float(sys.argv[1])) if len(sys.argv) > 1 else 10**9)
