"""Statistics of one step that are private: for diagnostics, and for counts before their noise."""

import torch
from torch import Tensor

from dpopt import ranks


class RawStatistics:
    """Sums of private statistics over the micro-batches of one step; one of them, a count, is released under noise."""

    ROOM = 6  # of these sums and a wish to stop, behind the gradients, where ranks add them up

    def __init__(self) -> None:
        self.sums: float | Tensor = 0.0  # (4,): losses, clipped examples, all examples, those that count
        self.unclipped: float | Tensor = 0.0  # the centered count of an adaptive clip rule
        self.slack: float | Tensor = 0.0  # the coordinates of `Slack`, which go where gradients are summed

    def add(self, losses: Tensor, clipped: Tensor, valid: Tensor, present: Tensor) -> None:
        """Add a micro-batch, on its device: nothing waits.

        Args:
            losses: (B,).
            clipped: (B,), whether an example is.
            valid: (B,), whether it counts at all.
            present: (B,), whether it is an example and no padding.
        """
        rows = losses.masked_fill(~valid, 0.0), clipped & valid, present, valid
        self.sums = self.sums + torch.stack([row.double() for row in rows]).sum(1)

    def add_up_ranks(self, row: Tensor, wish: bool) -> bool:
        """Add up sums of gradients and these statistics over all ranks, in one all-reduce.

        Args:
            row: the sums, with `ROOM` at the end.
            wish: whether this rank wishes to stop.

        Returns:
            Whether any rank does.
        """
        room = row[-self.ROOM :]
        room[0], room[1:-1], room[-1] = self.unclipped, self.sums, wish
        ranks.add_up(row)
        self.unclipped, self.sums = room[0].double(), room[1:-1].double()
        return bool(room[-1] > 0)

    def summary(self, sums: dict[str, Tensor], noise_std: float) -> dict[str, float]:
        """Name the statistics, next to the noise on each of these sums; reads the device once."""
        signal = torch.stack([total.double().square().sum() for total in sums.values()]).sum().sqrt()
        counted = torch.as_tensor(self.sums, dtype=torch.float64, device=signal.device).expand(4)
        loss, clipped, count, valid, length = torch.cat([counted, signal[None]]).cpu().tolist()
        dimension = sum(total.numel() for total in sums.values())
        return {
            "private/train_loss": loss / max(valid, 1),
            "private/clipped_fraction": clipped / max(valid, 1),
            "private/signal_to_noise": length / (noise_std * dimension**0.5) if noise_std else float("inf"),
            "private/batch_size": count,
        }
