"""Train on a pretended GPU; write what every step made a real one wait for: python pretended_run.py OUT ARGUMENTS."""

import json
import sys
from pathlib import Path

import torch
from gpu import pretended

pretended.pretend()
torch.set_num_threads(1)


class Launches:
    """In place of a Triton kernel: counts its launches."""

    def __init__(self, watch):
        self.watch = watch

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.watch.operations += 1

        return launch


def main(out, *arguments):
    """Train, and write one record per step."""
    from helpers import configure

    import dpopt.grad_sample.sums_triton as sums
    import dpopt.optim.microadam.triton_kernels as microadam
    import dpopt.privacy.noise_triton as noise
    from dpopt.training.run import run
    from dpopt.training.trainer import Trainer

    watch, steps, train_step = pretended.Watch(), [], Trainer.train_step

    def weighted_sum(rows, weights):
        watch.operations += 1
        present = weights.inner != 0
        return pretended.OnGPU(torch.mv(rows.inner.float()[present].T, weights.inner[present]))

    sums.weighted_sum = weighted_sum
    noise._noise_kernel = microadam._step_kernel = microadam._dense_kernel = Launches(watch)

    def counted(self, batch):
        watch.forget()
        measured = train_step(self, batch)
        events = [[kind, place, times] for (kind, place), times in watch.events.items()]
        pieces = -(-len(batch.indices) // self.components.micro_batch)
        steps.append({"events": events, "operations": watch.operations, "micro_batches": max(1, pieces)})
        return measured

    Trainer.train_step = counted
    with watch:
        result = run(configure(*arguments))
    Path(out).write_text(json.dumps({"status": result["status"], "steps": steps}))


if __name__ == "__main__":
    main(*sys.argv[1:])
