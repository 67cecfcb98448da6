"""What the two trainings learn from: samples of the store that are not degenerate, a few of them held out."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.diffusion.conditioning import Fields
from stages.foundation.errors import ComputeError
from stages.foundation.seeds import generator

MOST_HELD_OUT = 512


@dataclass(frozen=True)
class DeltaBatch:
    """Samples of the store.

    Attributes:
        fields: conditioning by name, each (N, …).
        rho: (N,), positive.
        deltas: (N, out, in), or None where only the scale is learned.
        numbers: their rows in the store, (N,), or None where nobody asks.
    """

    fields: Fields
    rho: Tensor
    deltas: Tensor | None = None
    numbers: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rho)

    def take(self, rows: Tensor | slice) -> "DeltaBatch":
        return self._each(lambda value: value[rows])

    def to(self, device: torch.device) -> "DeltaBatch":
        """On another device; page-locked memory is copied while other work goes on."""
        return self._each(lambda value: value.to(device, non_blocking=True))

    def pinned(self) -> "DeltaBatch":
        """In page-locked memory, from which a GPU copies by itself."""
        return self._each(lambda value: value.pin_memory() if value.device.type == "cpu" else value)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "DeltaBatch":
        fields = {name: change(value) for name, value in self.fields.items()}
        deltas, numbers = (None if value is None else change(value) for value in (self.deltas, self.numbers))
        return DeltaBatch(fields, change(self.rho), deltas, numbers)


def usable_split(degenerate: Tensor, rho: Tensor, sample_index: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers for training and held out, each ascending, of the rows that are neither degenerate nor zero.

    Args:
        degenerate, rho: (N,), bool and float.
        sample_index: of the sample that each row comes from, (N,); all rows of a sample go the same way.
        fraction: part of the samples held out, at least one and at most 512.
        seed: the run's; both trainings hold out the same rows.

    Raises:
        ComputeError: fewer than two rows are usable.
    """
    usable = torch.nonzero(~degenerate & (rho > 0)).squeeze(1)
    if len(usable) < 2:
        raise ComputeError(
            f"of {len(rho):,} deltas {len(usable)} are usable; the others are degenerate: the base fits these samples already",
            'collect rows the base has not seen with collect.split = "validation", or stop the base\'s training earlier',
        )
    # The first row of each sample, in the order of the rows.
    samples, group = sample_index[usable].unique(return_inverse=True)
    first = torch.full((len(samples),), len(usable)).scatter_reduce(0, group, torch.arange(len(usable)), "amin")
    if len(samples) < 2:
        raise ComputeError("only one sample has usable deltas, at least 2 are needed to hold one out", "collect more samples")
    held = max(1, min(MOST_HELD_OUT, len(samples) - 1, round(len(samples) * fraction)))
    order = first.sort().indices[torch.randperm(len(samples), generator=generator(seed, "held-out"))]
    chosen = torch.zeros(len(samples), dtype=torch.bool)
    chosen[order[:held]] = True
    return usable[~chosen[group]], usable[chosen[group]]
