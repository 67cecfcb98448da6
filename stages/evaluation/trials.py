"""Trials: layers overfitted with settings of `[collect]` on held-out samples, beside the deltas of their nearest neighbours."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.evaluation import rows as row
from stages.evaluation.choosing import Trial
from stages.evaluation.comparison import cross_fitted, seeded_order
from stages.evaluation.from_run import OverfittedOnDemand, make_subject, probe_of
from stages.evaluation.planned_cost import cost_of_run
from stages.evaluation.results import estimate_all, row_records
from stages.evaluation.rows import Row
from stages.evaluation.subject import Batch, EvaluatedSamples, Subject
from stages.evaluation.verdict import NEIGHBOURS as NEIGHBOUR_ROWS
from stages.foundation.seeds import seed_of
from stages.foundation.trees import to_device
from stages.lifecycle.context import RunContext
from stages.per_sample.capture import LAYER_INPUT
from stages.per_sample.layer import Layer
from stages.tasks.conditioning import check_condition
from stages.tasks.data import Split
from stages.tasks.neighbours import Neighbours, input_blocks, nearest, places_of

# Training samples that neighbours are looked for among: as many as the base sees in so many seconds.
SEARCH_S, MOST_SEARCHED, FEWEST_SEARCHED = 2.0, 20_000, 256
NEIGHBOURS, STRENGTHS = 5, (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
RESAMPLES, LARGEST_BATCH = 1000, 64


class Trials:
    """What trials have in common: the held-out samples, the training samples that are searched, and the neighbours among them.

    Attributes:
        searched: positions in train, (n,).
    """

    def __init__(self, context: RunContext, evaluated: EvaluatedSamples) -> None:
        self._context, self._evaluated = context, evaluated
        self.searched = self._rows_to_search()
        self._in_x: Neighbours | None = None
        self._seen: dict[str, Neighbours] = {}

    def attempt(self, layer: Layer, settings: dict[str, Any], size: int) -> tuple[Trial, dict[str, Any]]:
        """One layer with one recipe: every row on the held-out samples, `size` at once, and what a full run would cost."""
        subject = make_subject(self._context, layer, **settings)
        check_condition(subject.task, subject.base, layer, to_device(probe_of(self._context)[0], subject.device))
        searched = OverfittedOnDemand(subject, self._context.splits["train"], self.searched)
        subject = dataclasses.replace(subject, training=searched)
        evaluated = EvaluatedSamples(self._evaluated.split, self._evaluated.order, self._neighbours(subject))
        start = time.perf_counter()
        mean, counted = self._mean_delta(subject, size), min(len(self._evaluated.order), len(self.searched))
        each = (time.perf_counter() - start) / counted
        fitted = cross_fitted(subject, evaluated, _rows(mean, evaluated), STRENGTHS, size)
        gathered = {name: one.gathered for name, one in fitted.items()}
        found, metric = estimate_all(gathered, RESAMPLES, self.rng(), lambda done: None)
        record = {
            "layer": layer.name,
            "settings": settings,
            "rows": row_records(gathered, found),
            "strengths": {name: list(one.strengths) for name, one in fitted.items() if len(one.losses[0]) > 1},
            "cost": cost_of_run(self._context, Batch(subject, evaluated, evaluated.order[:1]), each),
        }
        losses = {name: metrics[metric] for name, metrics in found.items()}
        return Trial(layer.name, settings, metric, losses, {name: one.losses for name, one in fitted.items()}), record

    def rng(self) -> np.random.Generator:
        """The same resamples for every trial, so that trials can be compared."""
        return np.random.default_rng(seed_of(self._context.seed, "probe"))

    def _rows_to_search(self) -> Tensor:
        train, context = self._context.splits["train"], self._context
        few = to_device(train.inputs(range(min(32, len(train)))), context.device)
        # The first pass on a GPU also loads kernels.
        for _ in range(1 if context.device.type == "cpu" else 2):
            context.wait()
            start = time.perf_counter()
            with torch.no_grad():
                context.forward(context.base, few)
            context.wait()
        each = (time.perf_counter() - start) / min(32, len(train))
        count = max(FEWEST_SEARCHED, min(MOST_SEARCHED, int(SEARCH_S / max(each, 1e-9))))
        return seeded_order(len(train), context.seed, "probe searched", count)

    def _neighbours(self, subject: Subject) -> dict[str, Neighbours]:
        """In x, found once, and in what the layer sees, found once a layer."""
        train, searched, evaluated = self._context.splits["train"], self.searched, self._evaluated
        order, count = evaluated.order, len(evaluated.split)
        if self._in_x is None and (queries := places_of(subject.task, evaluated.split.inputs(order))) is not None:
            found = nearest(queries.to(subject.device), input_blocks(subject.task, train, searched, subject.device), NEIGHBOURS)
            self._in_x = found.spread(order, count)
        name = subject.layer.name
        if name not in self._seen:
            queries = _layer_inputs(subject, evaluated.split, order)
            seen = enumerate(_layer_inputs(subject, train, searched))
            blocks = ((number * LARGEST_BATCH, part) for number, part in seen)
            found = nearest(torch.cat(list(queries)), blocks, NEIGHBOURS)
            self._seen[name] = found.spread(order, count)
        return {row.IN_LAYER_INPUT: self._seen[name]} | ({} if self._in_x is None else {row.IN_X: self._in_x})

    def _mean_delta(self, subject: Subject, size: int) -> Tensor:
        """Of as many training samples as there are held-out ones, (out, in)."""
        train, positions = self._context.splits["train"], self.searched[: len(self._evaluated.order)]
        total, count = torch.zeros(subject.layer.matrix_shape, device=subject.device), 0
        for part in positions.split(size):
            deltas, degenerate = subject.overfit(train, part, train.batch(part))
            total += torch.where(degenerate.view(-1, 1, 1), 0, deltas).sum(0)
            count += (~degenerate).sum()
        self._context.wait()
        return total / max(1, int(count))


@torch.no_grad()
def _layer_inputs(subject: Subject, split: Split, positions: Tensor) -> Iterator[Tensor]:
    """What the layer sees of some samples, part by part, (n, d); as the store would have it."""
    for part in positions.split(LARGEST_BATCH):
        batch = Batch(subject, EvaluatedSamples(split, positions), part)
        fields = batch.fields
        seen = fields.get(LAYER_INPUT)
        yield (subject.overfitter.first_pass(batch.x).captured[LAYER_INPUT].float() if seen is None else seen).flatten(1)


def _rows(mean: Tensor, evaluated: EvaluatedSamples) -> list[Row]:
    missing = {kind: "" for kind in (row.IN_X, row.IN_LAYER_INPUT) if kind not in evaluated.neighbours}
    return [
        *row.base_and_oracle(),
        *row.neighbour_rows(missing, validated=NEIGHBOUR_ROWS),
        row.random_direction_row(lambda batch: batch.overfitted.flatten(1).norm(dim=1)),
        row.mean_row(mean),
    ]
