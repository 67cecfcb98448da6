"""The nearest training samples of the samples that are compared."""

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor

from stages.evaluation import rows as row
from stages.evaluation.stored_deltas import StoredDeltas
from stages.evaluation.subject import Batch, EvaluatedSamples, Subject
from stages.foundation.files import available_memory
from stages.foundation.memory import free_on_gpu
from stages.foundation.trees import leaves
from stages.per_sample.capture import LAYER_INPUT
from stages.tasks.data import Split
from stages.tasks.neighbours import Neighbours, SearchIndex, input_blocks, nearest, places_of

QUERY_NUMBERS = 1 << 27
# Of the free memory, what training samples may take beside the rest.
MEMORY_SHARE = 0.25
OnProgress = Callable[[int], None]


def find_neighbours(
    subject: Subject,
    training: StoredDeltas,
    evaluated: EvaluatedSamples,
    split: Split,
    k: int,
    size: int,
    on_progress: OnProgress,
    kinds: Collection[str] = (row.IN_X, row.IN_LAYER_INPUT),
) -> tuple[dict[str, Neighbours], dict[str, str]]:
    """The k nearest training samples of the evaluated samples, counted as the store's samples, by distances of the `kinds`;
    `split` holds them all.

    Returns:
        the neighbours, by what the distance is taken in, x and what the layer sees; and what they could not be found in, with
        the reason.
    """
    found, missing = {}, {}
    asked, numbers = evaluated.order.sort().values, training.sample_index[training.first_rows]
    count, own = len(evaluated.split), own_rows(evaluated.split, split, asked, numbers)
    if row.IN_X in kinds and places_of(subject.task, evaluated.split.inputs(asked[:1])) is None:
        missing[row.IN_X] = "the inputs hold integers, whose distance means nothing"
    elif row.IN_X in kinds:
        in_x = _nearest_in_x(subject, evaluated.split, asked, split, numbers, own, k, on_progress)
        found[row.IN_X] = in_x.spread(asked, count)
    if row.IN_LAYER_INPUT not in kinds:
        return found, missing
    if (known := training.field(LAYER_INPUT)) is None:
        return found, missing | {row.IN_LAYER_INPUT: "the store has no field layer_input"}
    known = known[training.first_rows]
    parts = [Batch(subject, evaluated, part).fields[LAYER_INPUT].flatten(1) for part in asked.split(size)]
    index = SearchIndex(known.to(subject.device))
    found[row.IN_LAYER_INPUT] = index.nearest(torch.cat(parts), k, _pairs(own)).spread(asked, count)
    return found, missing


def _nearest_in_x(
    subject: Subject,
    evaluated: Split,
    asked: Tensor,
    split: Split,
    numbers: Tensor,
    own: Tensor | None,
    k: int,
    on_progress: OnProgress,
) -> Neighbours:
    """Quickly where the training samples fit memory, else block by block; large inputs some at a time."""
    parts, first = [], evaluated.inputs(asked[:1])
    numbers_each, width = sum(leaf[0].numel() for leaf in leaves(first).values()), places_of(subject.task, first).shape[1]
    blocks = partial(input_blocks, subject.task, split, numbers, subject.device)
    fits = _fits(subject.device, len(numbers) * width)
    index = SearchIndex(torch.cat([block for _, block in blocks()])) if fits else None
    for part in torch.arange(len(asked)).split(max(1, QUERY_NUMBERS // numbers_each)):
        queries = places_of(subject.task, evaluated.inputs(asked[part])).to(subject.device)
        its_own = None if own is None else own[part]
        if index is None:
            parts.append(nearest(queries, blocks(), k, on_progress, its_own))
        else:
            told = partial(_told, on_progress, len(numbers) / len(queries))
            parts.append(index.nearest(queries, k, _pairs(its_own), told))
    return Neighbours(torch.cat([part.distance for part in parts]), torch.cat([part.row for part in parts]))


def _told(on_progress: OnProgress, each: float, queries: int) -> None:
    """Of queries answered, as if so many training samples had been seen for each."""
    on_progress(round(queries * each))


def _fits(device: torch.device, numbers: int) -> bool:
    """Whether memory holds so many numbers of candidates: an index has them twice, and once more while it is made."""
    free = free_on_gpu(device) if device.type == "cuda" else available_memory() or 0
    return 3 * 4 * numbers <= MEMORY_SHARE * free


def _pairs(own: Tensor | None) -> Tensor | None:
    """(query, candidate) of the candidates that are queries themselves, (P, 2)."""
    if own is None:
        return None
    asked = torch.nonzero(own >= 0).squeeze(1)
    return torch.stack([asked, own[asked]], dim=1)


def own_rows(evaluated: Split, training: Split, positions: Tensor, numbers: Tensor) -> Tensor | None:
    """The place among `numbers` of each evaluated sample that is a training sample itself, −1 for the others, (N,); None where
    the samples are of another data set."""
    if evaluated.dataset is not training.dataset:
        return None
    places = {number: place for place, number in enumerate(numbers.tolist())}
    return torch.tensor([places.get(number, -1) for number in evaluated.rows[positions].tolist()])
