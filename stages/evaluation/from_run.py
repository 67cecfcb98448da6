"""From a run to what its rows are compared on: the subject, the samples, the neighbours, the rows themselves."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stages.diffusion.delta_batch import usable_split
from stages.diffusion.generate import DeltaGenerator
from stages.evaluation import rows as row
from stages.evaluation.metrics import probabilities
from stages.evaluation.rows import Row
from stages.evaluation.stored_deltas import StoredDeltas
from stages.evaluation.subject import Batch, EvaluatedSamples, Subject
from stages.foundation.errors import TaskError
from stages.foundation.files import available_memory
from stages.foundation.memory import free_on_gpu
from stages.foundation.seeds import generator, global_seed
from stages.foundation.trees import Tree, to_device
from stages.lifecycle.context import RunContext
from stages.overfitting.batch_size import sample_bytes
from stages.overfitting.collector import Collector, make_overfitter
from stages.per_sample.layer import Layer
from stages.prediction.predictor import HALF_ROWS, in_half, load_generator, load_retrieval
from stages.run_directory.pipeline import AUTO
from stages.tasks.data import Split
from stages.tasks.losses import CLASSIFICATION
from stages.tasks.protocol import uses_default
from stages.tasks.user_code import user_code
from stages.tasks.views import any_views

PROBE = 4
# Deltas of a batch, all members of it, with what is computed from them.
BATCH_BYTES = 192 << 20
FEWEST, LARGEST, LARGEST_ON_GPU = 2, 256, 1024
# Of a batch on a CPU, with what its passes keep.
PASS_BYTES = 512 << 20
MEMORY_SHARE = 0.25
# Numbers that the classes' mean deltas may have, in float64.
MOST_CLASSES, MOST_CLASS_NUMBERS = 1000, 1 << 27


def make_subject(context: RunContext, layer: Layer, **settings: Any) -> Subject:
    """A model whose `layer` is overfitted as `[collect]` says, `settings` of it changed; without a denoiser.

    Raises:
        TaskError, DataError: faults of the task.
    """
    collect = context.project.settings.collect.model_copy(update={"store": "dense", **settings})
    rows, task, base = context.splits["train"], context.task, context.base_to_overfit(layer)
    overfitter = make_overfitter(task, base, layer, collect, probe_of(context))

    def collector(split: Split) -> Collector:
        return Collector(task, overfitter, type(layer.module(base)), split, context.device, context.seed)

    few = list(range(min(PROBE, len(rows))))
    collector(rows).confirm(few, rows.batch(few))

    def overfit(split: Split, positions: Tensor, given: tuple[Tree, Tree]) -> tuple[Tensor, Tensor]:
        found = collector(split).overfit_batch(positions, given, check=False)
        # In float32, as the store has them.
        return found["delta"].float(), found["degenerate"]

    return Subject(task, base, layer, overfitter, overfit, context.device, context.seed)


def with_denoiser(subject: Subject, context: RunContext, training: StoredDeltas | None, members: int) -> Subject:
    """The same model with the denoiser and the scale network of a finished run."""
    subject = dataclasses.replace(subject, retrieve=load_retrieval(context, subject.overfitter))
    rows = context.splits["all"]
    few = EvaluatedSamples(rows, torch.arange(min(HALF_ROWS, len(rows))))

    @torch.no_grad()
    def outputs(generate: DeltaGenerator) -> Tree:
        batch = Batch(dataclasses.replace(subject, generate=generate, ensemble=1), few, few.order)
        return batch.along(batch.generated[0])(1.0)

    generate = in_half(load_generator(context, strength=1.0), outputs)
    return dataclasses.replace(subject, generate=generate, ensemble=members, training=training)


def samples_at_once(context: RunContext, subject: Subject) -> int:
    """Samples of a batch: as `[evaluate] batch_size` says, or as many as memory holds with all their members; on a CPU fewer,
    for tensors that memory has to be mapped for anew cost more than a larger batch gains."""
    setting = context.project.settings.evaluate.batch_size
    if setting != AUTO:
        return setting
    members = 3 * 4 * subject.layer.numel * subject.ensemble
    probe = probe_of(context)
    x, of_step = (to_device(given[0], subject.device) for given in (probe, any_views(subject.task, *probe)))
    each = members + sample_bytes(subject.overfitter, x, of_step, factored=False)
    if context.device.type == "cuda":
        return max(FEWEST, min(LARGEST_ON_GPU, int(MEMORY_SHARE * free_on_gpu(context.device)) // each))
    room = min(PASS_BYTES, int(MEMORY_SHARE * (available_memory() or BATCH_BYTES)))
    return max(1, min(LARGEST, BATCH_BYTES // members, room // each))


def probe_of(context: RunContext) -> tuple[Tree, Tree]:
    """A few training samples to try things on."""
    rows = context.splits["train"]
    return rows.batch([i % len(rows) for i in range(PROBE)])


def training_rows(
    subject: Subject, training: StoredDeltas, means: Tensor | str, missing: dict[str, str]
) -> tuple[list[Row], dict[str, str]]:
    """The rows that are made of training samples' deltas, and those that cannot be, with the reason; `means` as `class_means`,
    `missing` as `find_neighbours` gives them."""
    left_out = {}
    found = [row.random_training_row(), row.mean_row(training.mean.to(subject.device))]
    if isinstance(means, str):
        left_out[row.CLASS_MEAN] = means
    else:
        found.append(class_mean_row(means))
    left_out |= {name: missing[kind] for name, kind in row.KINDS.items() if kind in missing}
    return [*found, *row.neighbour_rows(missing)], left_out


def class_mean_row(means: Tensor) -> Row:
    """The mean delta of the class that the base takes a sample for; means (classes, out, in)."""
    return row.delta_row(row.CLASS_MEAN, lambda batch: means[class_numbers(batch)].unsqueeze(1), validated=True)


def class_means(subject: Subject, training: StoredDeltas, example: Batch) -> Tensor | str:
    """The mean delta of the training samples that the base takes for each class, (classes, out, in); or why there is none."""
    if subject.task.kind != CLASSIFICATION:
        return "the task has no classes"
    outputs, output = training.field("base_output", vectors=True), example.first.output
    found = probabilities(output, example.y)
    if outputs is None or found is None or found[1].shape[1] > 1 or outputs.shape[1] != output[0].numel():
        return "the store has no logits of one class number a sample"
    count = max(2, outputs.shape[1])
    if count > MOST_CLASSES or count * subject.layer.numel > MOST_CLASS_NUMBERS:
        return f"the mean deltas of {count:,} classes take more memory than is spent on them"
    return training.means(_class_numbers(outputs), count).to(subject.device)


def class_numbers(batch: Batch) -> Tensor:
    """The class that the base takes each sample for, (B,), found as for the training samples: from the conditioning."""
    return _class_numbers(batch.fields["base_output"].flatten(1))


def _class_numbers(outputs: Tensor) -> Tensor:
    """(B, C) or (B, 1) to (B,)."""
    return outputs.argmax(1) if outputs.shape[1] > 1 else (outputs[:, 0] > 0).long()


def unseen(context: RunContext, training: StoredDeltas) -> Tensor:
    """Which validation samples no training of OCD has drawn, (N,) bool.

    Of a store that holds validation samples those are kept that both trainings held out, and as large a part of the degenerate
    ones, which no training draws: a fair sample.
    """
    split, settings = context.splits["validation"], context.project.settings
    if context.validation_is_given:
        return torch.ones(len(split), dtype=torch.bool)
    allowed = torch.zeros(len(training), dtype=torch.bool)
    share = min(settings.train_diffusion.held_out, settings.train_scale.held_out)
    train, held_out = usable_split(training.degenerate, training.rho, training.sample_index, share, context.seed)
    allowed[held_out] = True
    # Of a sample with several rows one may be degenerate and another be drawn.
    drawn = torch.isin(training.sample_index, training.sample_index[train])
    others = torch.nonzero(training.degenerate & ~drawn).squeeze(1)
    part = round(len(others) * len(held_out) / len(training.usable))
    allowed[others[torch.randperm(len(others), generator=generator(context.seed, "evaluate", "degenerate"))[:part]]] = True
    in_store, free = (torch.isin(split.rows, index) for index in (training.sample_index, training.sample_index[allowed]))
    return ~in_store | free


def extra_rows(context: RunContext, taken: set[str]) -> list[Row]:
    """The task's own rows.

    Raises:
        TaskError: the task raises, or names a row as one in `taken`.
    """
    splits = (context.splits["train"], context.splits["validation"])
    if not uses_default(context.task, "extra_rows"):
        # They may take a training, of which nothing else is heard.
        context.report.message("the task's own rows: extra_rows()")
    with user_code("extra_rows()"), global_seed(context.seed, "evaluate", "extra_rows"):
        found = context.task.extra_rows(context.base, *splits, seed=context.seed, device=context.device)
    if not isinstance(found, dict) or not all(callable(predict) for predict in found.values()):
        raise TaskError("extra_rows() gave no dict of functions", 'return {"a name": lambda x: outputs}, or {} for no rows')
    if clash := sorted((taken | set(row.TABLE)) & found.keys()):
        raise TaskError(f"extra_rows() gave a row named {clash[0]!r}, which ocd has itself", "give it another name")
    return [row.output_row(name, _guarded(name, predict)) for name, predict in found.items()]


def _guarded(name: str, predict: Callable[[Tree], Tree]) -> Callable[[Batch], Tree]:
    def output(batch: Batch) -> Tree:
        with user_code(f"extra_rows()[{name!r}]"):
            return predict(batch.x)

    return output


class OverfittedOnDemand:
    """The deltas of training samples, each overfitted when it is asked for; rows are counted in the order of `positions`."""

    def __init__(self, subject: Subject, split: Split, positions: Tensor) -> None:
        self._subject, self._split, self._positions = subject, split, positions
        self.usable = torch.arange(len(positions))

    def take(self, rows: Tensor) -> Tensor:
        positions = self._positions[rows.cpu()]
        deltas, degenerate = self._subject.overfit(self._split, positions, self._split.batch(positions))
        return deltas * ~degenerate.view(-1, 1, 1)

    def of_samples(self, places: Tensor) -> Tensor:
        """The same: a row is a sample."""
        return self.take(places)
