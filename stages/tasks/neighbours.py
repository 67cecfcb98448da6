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
# Of the quick search, and how many candidates are looked at closely beside twice those that are asked for.
QUICK_QUERIES, QUICK_CANDIDATES, MORE = 1024, 16384, 16
# Numbers of the differences that are looked at closely at once.
CLOSE_NUMBERS = 1 << 24
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


class SearchIndex:
    """Candidates in memory, (M, d), for a quick search: a list by products in single precision, of which the k are taken by the
    differences themselves; where rounding could have kept one off the list, by `nearest`."""

    def __init__(self, candidates: Tensor) -> None:
        self._candidates = where_doubles_are(candidates.float())
        self._centre = self._candidates.mean(0)
        self._points = self._candidates - self._centre
        self._squares = self._points.square().sum(1)

    def nearest(
        self,
        queries: Tensor,
        k: int,
        excluded: Tensor | None = None,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> Neighbours:
        """As the function `nearest` finds them.

        Args:
            queries: (N, d).
            k: how many; fewer where there are fewer candidates.
            excluded: pairs (query, candidate) that do not count, (P, 2).
            on_progress: told of the queries answered so far.

        Returns:
            what was found; a candidate that does not count has distance inf.
        """
        queries, distances, rows = where_doubles_are(queries.float()), [], []
        excluded = None if excluded is None else excluded.to(queries.device)
        for start in range(0, len(queries), QUICK_QUERIES):
            asked = queries[start : start + QUICK_QUERIES]
            pairs = None if excluded is None else _pairs_of(excluded, start, len(asked))
            distance, row = self._nearest(asked, k, pairs)
            distances.append(distance)
            rows.append(row)
            on_progress(start + len(asked))
        return Neighbours(torch.cat(distances).float(), torch.cat(rows))

    def _nearest(self, asked: Tensor, k: int, pairs: Tensor | None) -> tuple[Tensor, Tensor]:
        """Distances and rows of a few queries, (N, k) each."""
        seen, count = asked - self._centre, len(self._points)
        value, row = _shortlist(seen, self._points, self._squares, min(2 * k + MORE, count), pairs)
        distance = _distances(asked, self._candidates, row).masked_fill(value == torch.inf, torch.inf)
        distance, order = distance.sort(dim=1, stable=True)
        distance, picked = distance[:, :k], row.gather(1, order)[:, :k]
        if row.shape[1] < count and (places := _unsure(value[:, -1], distance[:, -1], seen)):
            distance[places], picked[places] = _exactly(asked, self._candidates, k, pairs, places)
        return distance, picked


def _unsure(last: Tensor, furthest: Tensor, seen: Tensor) -> list[int]:
    """The queries (N, d), from the centre, for which rounding could have kept one of the k off the list, of which the `last`
    values and the `furthest` distances are given, (N,) each."""
    # |fl(q·c) − q·c| ≤ d ε ‖q‖ ‖c‖ (Higham, 2002, Sec. 3.1), twice, and as much again for the squares and the centre.
    rounding, own = 4 * seen.shape[1] * torch.finfo(torch.float32).eps, seen.square().sum(1)
    # A candidate further from the centre than ‖q‖ and the furthest together is no nearer, whatever rounding does.
    least = last + own - rounding * (own + (own.sqrt() + furthest).square())
    return torch.nonzero(~(furthest.square() <= least)).flatten().tolist()


def _pairs_of(excluded: Tensor, start: int, count: int) -> Tensor:
    """The pairs of some queries, these counted from 0."""
    return excluded[(excluded[:, 0] >= start) & (excluded[:, 0] < start + count)] - torch.tensor(
        [start, 0], device=excluded.device
    )


def _shortlist(queries: Tensor, points: Tensor, squares: Tensor, count: int, excluded: Tensor | None) -> tuple[Tensor, Tensor]:
    """The `count` candidates of the smallest ‖c‖² − 2 q·c, with these values, in single precision: (N, count) each."""
    values, rows = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(points), QUICK_CANDIDATES):
        block = slice(start, start + QUICK_CANDIDATES)
        found = torch.addmm(squares[block], queries, points[block].T, alpha=-2)
        if excluded is not None:
            here = excluded[(excluded[:, 1] >= start) & (excluded[:, 1] < start + found.shape[1])]
            found[here[:, 0], here[:, 1] - start] = torch.inf
        value, row = found.topk(min(count, found.shape[1]), dim=1, largest=False)
        values, rows = torch.cat([values, value], dim=1), torch.cat([rows, row + start], dim=1)
        values, order = values.topk(min(count, values.shape[1]), dim=1, largest=False)
        rows = rows.gather(1, order)
    return values, rows


def _distances(queries: Tensor, candidates: Tensor, rows: Tensor) -> Tensor:
    """‖q − c‖ of each query and some candidates of its own, (N, n), in float64."""
    size = max(1, CLOSE_NUMBERS // (rows.shape[1] * queries.shape[1]))
    parts = zip(queries.split(size), rows.split(size), strict=True)
    return torch.cat([(part.unsqueeze(1) - candidates[row]).double().norm(dim=2) for part, row in parts])


def _exactly(queries: Tensor, candidates: Tensor, k: int, excluded: Tensor | None, places: list[int]) -> tuple[Tensor, Tensor]:
    """The k nearest of some of the queries by `nearest`: distances and rows, (n, k) each."""
    none = torch.empty(0, dtype=torch.long, device=queries.device)
    left_out = [none if excluded is None else excluded[excluded[:, 0] == place, 1] for place in places]
    blocks = (
        (start, candidates[start : start + CANDIDATES_AT_ONCE]) for start in range(0, len(candidates), CANDIDATES_AT_ONCE)
    )
    found = nearest(queries[places], blocks, k + max(map(len, left_out)))
    distances, rows = [], []
    for distance, row, without in zip(found.distance.double(), found.row, left_out, strict=True):
        counted = ~torch.isin(row, without)
        distance, row = distance[counted][:k], row[counted][:k]
        short = k - len(row)
        distances.append(torch.cat([distance, distance.new_full((short,), torch.inf)]))
        rows.append(torch.cat([row, without[:short]]))
    return torch.stack(distances), torch.stack(rows)


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
