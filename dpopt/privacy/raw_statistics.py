"""Statistics of one step that are private: for diagnostics, and for counts before their noise."""

from torch import Tensor


class RawStatistics:
    """Sums of private statistics over the micro-batches of one step; kept only for diagnostics."""

    def __init__(self) -> None:
        self.loss, self.clipped, self.count, self.valid = 0.0, 0.0, 0, 0
        self.unclipped: float | Tensor = 0.0  # the centered count of an adaptive clip rule

    def add(self, losses: Tensor, clipped: Tensor, count: int) -> None:
        self.loss += float(losses.double().sum())
        self.clipped += float(clipped.sum())
        self.count += count
        self.valid += len(losses)

    def summary(self, sums: dict[str, Tensor], noise_std: float) -> dict[str, float]:
        dimension = sum(total.numel() for total in sums.values())
        signal = sum(float(total.double().square().sum()) for total in sums.values()) ** 0.5
        return {
            "private/train_loss": self.loss / max(self.valid, 1),
            "private/clipped_fraction": self.clipped / max(self.valid, 1),
            "private/signal_to_noise": signal / (noise_std * dimension**0.5) if noise_std else float("inf"),
            "private/batch_size": float(self.count),
        }
