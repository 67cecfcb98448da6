"""The nearest training samples, by Euclidean distance."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.foundation.errors import TaskError
from stages.foundation.no_doubles import where_doubles_are
from stages.foundation.trees import Tree, batch_size, leaves
from stages.tasks.data import Split
from stages.tasks.protocol import Task
from stages.tasks.user_code import user_code

QUERIES_AT_ONCE, CANDIDATES_AT_ONCE = 2048, 4096
# Numbers of a block of candidates: large inputs come in smaller blocks.
BLOCK_NUMBERS = 1 << 24


@dataclass(frozen=True)
class Neighbours:
    """The k nearest of some candidates for each of N queries, nearest first.

    Attributes:
        distance: Euclidean, (N, k).
        row: the candidates' numbers, (N, k).
    """

    distance: Tensor
    row: Tensor

    def spread(self, positions: Tensor, count: int) -> "Neighbours":
        """The same by position in a split of `count` samples; those that were not asked for have row −1."""
        distance, row = (torch.full((count, part.shape[1]), -1, dtype=part.dtype) for part in (self.distance, self.row))
        distance[positions], row[positions] = self.distance.cpu(), self.row.cpu()
        return Neighbours(distance, row)


def nearest(
    queries: Tensor,
    candidates: Iterable[tuple[int, Tensor]],
    k: int,
    on_progress: Callable[[int], None] = lambda done: None,
    own: Tensor | None = None,
) -> Neighbours:
    """argmin_j ‖q − c_j‖ and its successors.

    Args:
        queries: (N, d).
        candidates: (number of the first, (n, d)), block by block.
        k: how many; fewer where there are fewer candidates.
        on_progress: told of the candidates seen so far.
        own: the candidate that is the query itself and does not count, (N,); −1 for none.
    """
    queries = where_doubles_are(queries)
    distance = torch.empty(len(queries), 0, dtype=torch.float64, device=queries.device)
    row = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start, block in ((start, where_doubles_are(block)) for start, block in candidates):
        numbers = torch.arange(start, start + len(block), device=queries.device)
        found = torch.cat([_squared(part, block) for part in queries.split(QUERIES_AT_ONCE)])
        if own is not None:
            found[own.to(found.device).view(-1, 1) == numbers] = torch.inf
        joined = torch.cat([distance, found], dim=1)
        distance, picked = joined.topk(min(k, joined.shape[1]), dim=1, largest=False)
        row = torch.cat([row, numbers.expand(len(queries), -1)], dim=1).gather(1, picked)
        on_progress(start + len(block))
    return Neighbours(distance.clamp_min(0).sqrt().to(queries.dtype), row)


def _squared(queries: Tensor, block: Tensor) -> Tensor:
    """‖q‖² − 2 q·c + ‖c‖², (N, n). In float64 and seen from the block's mean: where one feature is much wider than the others,
    the difference would lose these."""
    centre = block.double().mean(0)
    queries, block = queries.double() - centre, block.double() - centre
    return queries.square().sum(1, keepdim=True) - 2 * queries @ block.T + block.square().sum(1)


def places_of(task: Task, x: Tree) -> Tensor | None:
    """Where inputs lie, (B, d) float32: as the task has it, else as `flat_inputs`.

    Raises:
        TaskError: `coordinates` gives something else.
    """
    with user_code("coordinates()"):
        found = task.coordinates(x)
    if found is not None:
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != batch_size(x):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise TaskError(
                f"coordinates() gave {shape} for a batch of {batch_size(x)}", "give one row of numbers a sample, (B, d)"
            )
        return found.float()
    return flat_inputs(x)


def flat_inputs(x: Tree) -> Tensor | None:
    """The numbers of each input side by side, (B, d) float32; None where they hold integers, whose distance means nothing."""
    parts = list(leaves(x).values())
    if any(not part.is_floating_point() for part in parts):
        return None
    return torch.cat([part.float().reshape(len(part), -1) for part in parts], dim=1)


def input_blocks(task: Task, split: Split, positions: Tensor, device: torch.device) -> Iterable[tuple[int, Tensor]]:
    """Where some samples lie, block by block, with the number of the first."""
    x = split.inputs(positions[:1])
    width = max(places_of(task, x).shape[1], sum(leaf[0].numel() for leaf in leaves(x).values()))
    size = max(1, min(CANDIDATES_AT_ONCE, BLOCK_NUMBERS // width))
    for start in range(0, len(positions), size):
        yield start, places_of(task, split.inputs(positions[start : start + size])).to(device)
