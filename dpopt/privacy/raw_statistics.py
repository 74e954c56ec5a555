"""Statistics of one step that are private: for diagnostics, and for counts before their noise."""

from torch import Tensor

from dpopt import ranks


class RawStatistics:
    """Sums of private statistics over the micro-batches of one step; one of them, a count, is released under noise."""

    ROOM = 6  # of these sums and a wish to stop, behind the gradients, where ranks add them up

    def __init__(self) -> None:
        self.loss, self.clipped, self.count, self.valid = 0.0, 0.0, 0, 0
        self.unclipped: float | Tensor = 0.0  # the centered count of an adaptive clip rule
        self.slack: float | Tensor = 0.0  # the coordinates of `Slack`, which go where gradients are summed

    def add(self, losses: Tensor, clipped: Tensor, count: int) -> None:
        self.loss += float(losses.double().sum())
        self.clipped += float(clipped.sum())
        self.count += count
        self.valid += len(losses)

    def add_up_ranks(self, row: Tensor, wish: bool) -> bool:
        """Add up sums of gradients and these statistics over all ranks, in one all-reduce.

        Args:
            row: the sums, with `ROOM` at the end.
            wish: whether this rank wishes to stop.

        Returns:
            Whether any rank does.
        """
        for place, value in enumerate((self.unclipped, self.loss, self.clipped, self.count, self.valid, wish)):
            row[place - self.ROOM] = value
        ranks.add_up(row)
        self.unclipped = row[-self.ROOM].double()
        self.loss, self.clipped, count, valid, wishes = row[1 - self.ROOM :].tolist()
        self.count, self.valid = round(count), round(valid)
        return wishes > 0

    def summary(self, sums: dict[str, Tensor], noise_std: float) -> dict[str, float]:
        dimension = sum(total.numel() for total in sums.values())
        signal = sum(float(total.double().square().sum()) for total in sums.values()) ** 0.5
        return {
            "private/train_loss": self.loss / max(self.valid, 1),
            "private/clipped_fraction": self.clipped / max(self.valid, 1),
            "private/signal_to_noise": signal / (noise_std * dimension**0.5) if noise_std else float("inf"),
            "private/batch_size": float(self.count),
        }
