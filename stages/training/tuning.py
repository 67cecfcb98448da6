"""Tuning a denoiser by what its deltas do to the task's loss: beyond the paper."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.diffusion.conditioning import Fields
from stages.diffusion.delta_batch import DeltaBatch
from stages.diffusion.denoiser import Denoiser
from stages.diffusion.denoising import drawn_with_gradient
from stages.diffusion.sampler import Noise
from stages.diffusion.schedule import NoiseSchedule
from stages.foundation.deltas import Deltas
from stages.foundation.seeds import generator, seed_of
from stages.foundation.trees import Tree, repeat_batch, to_device, tree_map
from stages.overfitting.overfitter import Overfitter
from stages.per_sample.capture import LAYER_INPUT
from stages.per_sample.weights import Substitution
from stages.tasks.data import Split
from stages.tasks.loader import losses
from stages.tasks.protocol import Task
from stages.tasks.views import glances_of
from stages.training.members_loss import members_loss

STAGE = "train-diffusion"
# Makes the context that the denoiser's passes run in.
Precision = Callable[[], AbstractContextManager[Any]]
# Steps of the sampler that deltas are drawn with, as `[infer]` has it by default.
SAMPLE_STEPS = 10
# Samples that it is judged on: so many, or this part of those of the steps between two evaluations, a small part of the work.
FEWEST_JUDGED, PART_JUDGED = 16, 0.1


def spread(count: int, samples: int) -> Tensor:
    """Which of `count` samples tuning is judged on, where `samples` are used between two evaluations; evenly spread."""
    return torch.linspace(0, count - 1, min(count, max(FEWEST_JUDGED, int(PART_JUDGED * samples)))).long()


@dataclass(frozen=True)
class Judged:
    """Validation samples that tuning is judged on: the base has not learned their labels, as those of the store's rows.

    Attributes:
        rows: their conditioning; `numbers` are their positions in the split.
        loss_size: the mean size of the base's losses there.
    """

    split: Split
    rows: DeltaBatch
    loss_size: float


@dataclass(frozen=True)
class Tuning:
    """L(f_{θ + ρ̂·Ω̂_0}(x), y) / L̄: the loss with a delta that the denoiser draws, in units of the base's.

    The delta has the length that is predicted, as it will be: ρ̂ of the scale network, changed by the denoiser's own `Lengths`,
    which are tuned with it. Of large samples the task shows a part.

    Attributes:
        scale: fields to log ρ̂, (B,), as it has been trained.
        overfitter: runs the base with a weight for each sample.
        split: all training samples.
        sample_index: of each row of the store, its sample's position there, (N,).
        loss_size: L̄, the mean size of the base's losses over the store.
        samples: rows of a step.
        between: rows of the steps between two evaluations.
        members: drawn of each row, whose loss is that of all of them together.
        vectors: the denoiser draws output vectors.
        judged: what it is judged on; None: the store's held-out rows.
    """

    task: Task
    scale: Callable[[Fields], Tensor]
    overfitter: Overfitter
    split: Split
    sample_index: Tensor
    loss_size: float
    schedule: NoiseSchedule
    seed: int
    samples: int
    between: int
    members: int = 1
    vectors: bool = False
    judged: Judged | None = None

    def __call__(self, denoiser: Denoiser, rows: DeltaBatch, step: int, precision: Precision = nullcontext) -> Tensor:
        """The losses of a step, (B,), after as many passes of the sampler as the step draws; the denoiser's run in `precision`,
        the model's as it is."""
        passes = 1 + seed_of(self.seed, STAGE, "passes", step) % SAMPLE_STEPS
        given = self.split.batch(self.sample_index[rows.numbers])
        return self._losses(denoiser, rows, given, passes, (STAGE, "tune", step), precision) / self.loss_size

    def judged_samples(self, held_out: DeltaBatch) -> int:
        """How many samples the loss is of that it is judged by."""
        return len(self.judged.rows) if self.judged is not None else len(spread(len(held_out), self.between))

    @torch.no_grad()
    def held_out_loss(self, denoiser: Denoiser, held_out: DeltaBatch, size: int, precision: Precision = nullcontext) -> float:
        """The loss on validation samples, or on held-out rows, `size` at once, the same draws every time."""
        denoiser.eval()
        rows, split, unit = held_out.take(spread(len(held_out), self.between)), self.split, self.loss_size
        positions = self.sample_index[rows.numbers]
        if self.judged is not None:
            rows, split, unit = self.judged.rows, self.judged.split, self.judged.loss_size
            positions = rows.numbers
        found = [
            self._losses(
                denoiser, rows.take(part), split.batch(positions[part]), SAMPLE_STEPS, (STAGE, "judge tuning"), precision
            )
            for part in torch.arange(len(rows)).split(min(size, self.samples))
        ]
        return float(torch.cat(found).mean()) / unit

    def _losses(
        self,
        denoiser: Denoiser,
        rows: DeltaBatch,
        given: tuple[Tree, Tree],
        passes: int,
        seed: tuple[str | int, ...],
        precision: Precision,
    ) -> Tensor:
        """Of samples given as (x, y), (B,)."""
        device, shape = next(denoiser.parameters()).device, denoiser.shape
        numbers = rows.numbers.tolist()
        seeds = [(self.seed, *seed, number) for number in numbers]
        # The first member's noise is what it is where there is one alone.
        of_members = [(*one, *([member] if member else [])) for member in range(self.members) for one in seeds]
        noise = Noise([generator(*one) for one in of_members], shape, device).draw()
        on = rows.to(device)
        with precision():
            encoded = denoiser.encode(on.fields)
            every = encoded.repeat(self.members, 1)
            drawn = drawn_with_gradient(denoiser, self.schedule, every, noise, passes, SAMPLE_STEPS)
            with torch.no_grad():
                rho = self.scale(on.fields).exp()
            length = denoiser.length(encoded, rho).repeat(self.members)
        deltas = drawn * (length / (shape[0] * shape[1]) ** 0.5).view(-1, 1, 1)
        x, y = (to_device(tree, device) for tree in glances_of(self.task, *given, seeds))
        if self.members == 1:
            return losses(self.task, self._outputs(x, deltas), y)
        outputs = self._outputs(repeat_batch(x, self.members), deltas)
        by_member = tree_map(lambda leaf: leaf.unflatten(0, (self.members, -1)), outputs)
        return members_loss(self.task, by_member, y)

    def _outputs(self, x: Tree, deltas: Tensor) -> Tree:
        """The model's with deltas (B, out, in), or with u hᵀ/‖h‖ of output vectors u (B, out, 1), h of the x that is shown."""
        method, layer = self.overfitter.method, self.overfitter.layer
        if self.vectors:
            if isinstance(method, Substitution):
                return method.shifted(x, deltas.flatten(1))
            seen = self.overfitter.first_pass(x).captured[LAYER_INPUT].flatten(1).float()
            deltas = Deltas(deltas.squeeze(2), F.normalize(seen, dim=1)).matrices()
        weight = layer.weight(self.overfitter.model)
        return method(x, weight + deltas.reshape(len(deltas), *layer.shape).to(weight))
