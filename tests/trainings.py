"""What the tests of whole trainings share: short ones of every preset, their steps and losses, and steps that do nothing."""

import time

import numpy as np
import torch
from folders import put_all, reader_of

from stages.foundation.progress import Silent
from stages.training.batches import WHOLE, TrainingBatches
from stages.training.plan import Plan
from stages.training.run import TrainingRun

# Small, and with checkpoints and evaluations that do not fall together.
QUICK = {"max_steps": 40, "evaluate_steps": 16, "checkpoint_steps": 7, "batch_size": 9}
PRESETS = {
    "mlp": {"preset": "mlp", "width": 16},
    "factored": {"preset": "factored", "width": 16, "rank": 2},
    "small": {"preset": "small", "width": 8, "multipliers": [1, 2]},
    "paper": {"preset": "paper", "width": 8, "multipliers": [1, 1, 2]},
    "authors": {"preset": "authors", "width": 8, "multipliers": [1, 2], "pad_to": 16},
}


def words(table, stage="train-diffusion"):
    return put_all(stage, table)


def losses_of(ocd, folder, *more):
    """The losses and the held-out ones of a training of the denoiser that begins anew."""
    ocd(folder, "train-diffusion", *more, "--force")
    rows = folder.read("train-diffusion/metrics.jsonl")
    return [row["loss"] for row in rows], [row["score"] for row in rows]


def rows_of(folder, **options):
    """The batches that a training draws of a collected project."""
    settings = {"deltas": WHOLE, "held_out": 0.1, "batch_size": 7, "seed": 3, "device": torch.device("cpu"), "memory": "auto"}
    return TrainingBatches(reader_of(folder), **(settings | options))


class Counter:
    """A training whose steps do nothing, slowly if asked to, and whose state is their number.

    Args:
        losses: of the steps whose loss is not 1.
        delay: seconds that a step takes.
    """

    def __init__(self, losses=None, delay=0.0):
        self.step, self._losses, self._delay, self.runs_ahead = 0, losses or {}, delay, False

    def start(self):
        time.sleep(self._delay)
        loss = self._losses.get(self.step + 1, 1.0)
        self.step += bool(np.isfinite(loss))
        return lambda: loss

    def state(self):
        return {"step": torch.tensor(self.step)}

    snapshot = state

    def restore(self, tensors, step):
        assert int(tensors["step"]) == step
        self.step = step


def run_of(folder, counter, blame=lambda step: "", score=lambda: 1.0, start=None, **plan):
    """A short run of such a training, to be continued in the same folder; `score` is the held-out loss, on deltas, too."""
    plan = Plan(**({"max_steps": 20, "evaluate_steps": 5, "checkpoint_steps": 6, "patience": 0} | plan))

    def figures():
        found = score()
        return {"score": found, "denoising_loss": found}

    return TrainingRun(folder, "print", counter, figures, plan, Silent(), blame, start=start)
