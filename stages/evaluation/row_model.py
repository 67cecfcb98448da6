"""Predicting as a row of `evaluate` does, for inputs without labels."""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.evaluation import from_run
from stages.evaluation import rows as row
from stages.evaluation.comparison import combined
from stages.evaluation.fitting import temperature_row
from stages.evaluation.nearest_labels import nearest_labels_row
from stages.evaluation.neighbours import find_neighbours
from stages.evaluation.requested_rows import TRAINED, requested_row
from stages.evaluation.rows import Row
from stages.evaluation.stored_deltas import StoredDeltas
from stages.evaluation.subject import Batch, EvaluatedSamples, Subject
from stages.foundation.errors import ArtifactError, SettingsError
from stages.foundation.torch_state import usual_torch
from stages.foundation.trees import Tree
from stages.lifecycle.context import RunContext
from stages.prediction.for_training import store_of
from stages.prediction.personalised import Prediction
from stages.prediction.predictor import STRENGTH_FILE
from stages.run_directory.descriptions import Strength
from stages.run_directory.pipeline import AUTO
from stages.tasks.data import Split


def chosen_row(context: RunContext) -> str:
    """The row that `[infer] row` names, of those that `evaluate` has and that predictions can be made with; `auto` is the one
    with the lowest validation loss.

    Raises:
        ArtifactError: nothing was judged on validation samples.
        SettingsError: there is no such row.
    """
    name, known = context.project.settings.infer.row, _known(context)
    if name == AUTO and known.best is None:
        raise ArtifactError(
            "infer.row = 'auto': evaluate had no validation samples to choose a row by",
            "name one with --row, or give validation samples with task.validation",
        )
    if name != AUTO and name not in known.rows:
        near = difflib.get_close_matches(name, known.rows, 1, 0.6)
        why = ""
        if not row.predicts(name):
            why = ": it takes labels" if name in row.OF_LABELS else ": it is there to compare with"
        hint = f"did you mean {near[0]!r}? There are" if near and not why else "take one of"
        raise SettingsError(
            f"infer.row = {name!r}: evaluate has no such row to predict with{why}",
            f"{hint}: {', '.join(known.rows)}; ocd evaluate --add NAME adds one that takes a training",
        )
    return known.best if name == AUTO else name


def _known(context: RunContext) -> Strength:
    return Strength.read(context.file_of("evaluate", STRENGTH_FILE))


@dataclass(frozen=True)
class RowModel:
    """Predicts as a row of `evaluate` does; without labels.

    Attributes:
        strength: None where the row has no deltas of the layer.
        evaluated: the inputs, with the nearest training samples of those that are predicted.
    """

    subject: Subject
    row: Row
    strength: float | None
    evaluated: EvaluatedSamples

    @property
    def device(self) -> torch.device:
        return self.subject.device

    def drawn(self, rows: Sequence[int], members: range) -> None:
        """Its noise is drawn when it is wanted."""

    def combine(self, outputs: Tree) -> Tree:
        """Members (E, B, …) to their combination (B, …); a lone member is its own."""
        return combined(self.subject, outputs)

    @usual_torch()
    @torch.no_grad()
    def predict(
        self, x: Tree, ensemble: int, *, rows: Sequence[int], first_member: int = 0, noise: object = None
    ) -> Prediction:
        """Predict for inputs (B, …) at `rows` of the split, with all members that the row has."""
        batch = Batch(self.subject, self.evaluated, torch.tensor(list(rows)), (x, None))
        members = self.row.members(batch)(1.0 if self.strength is None else self.strength)
        return Prediction(self.combine(members), members, batch.first.output)

    def with_neighbours(self, context: RunContext, positions: Tensor, size: int) -> "RowModel":
        """The same, with the nearest training samples of the inputs at some positions, if the row goes by them; `size` inputs
        at once go through the base."""
        kind = row.KINDS.get(self.row.name)
        if kind is None or not len(positions):
            return self
        training, report = self.subject.training, context.report
        found, _ = find_neighbours(
            self.subject,
            training,
            EvaluatedSamples(self.evaluated.split, positions),
            context.splits["all"],
            context.project.settings.evaluate.neighbours,
            size,
            lambda done: report.progress(done, len(training), "neighbours"),
            kinds=(kind,),
        )
        return dataclasses.replace(self, evaluated=EvaluatedSamples(self.evaluated.split, positions, found))


def make_row_model(context: RunContext, name: str, inputs: Split) -> RowModel:
    """A row of a finished evaluation, to predict for the inputs of a split, once it is given their neighbours.

    Raises:
        OcdError: faults of the task; a stage of the row's branch fails.
    """
    training = StoredDeltas(store_of(context))
    ensemble = context.project.settings.infer.ensemble
    subject = from_run.with_denoiser(from_run.make_subject(context, context.layer), context, training, ensemble)
    made = _row(context, subject, training, name)
    return RowModel(subject, made, _known(context).rows[name], EvaluatedSamples(inputs, torch.arange(0)))


def _row(context: RunContext, subject: Subject, training: StoredDeltas, name: str) -> Row:
    """The row of that name."""
    ours = [*row.base_and_oracle(), *row.generated_rows(training.mean_rho), *row.neighbour_rows({})]
    if found := next((one for one in ours if one.name == name), None):
        return found
    if name == row.MEAN_DELTA:
        return row.mean_row(training.mean.to(subject.device))
    if name in (row.CLASS_MEAN, row.NEAREST_LABELS):
        test = context.test_split
        example = Batch(subject, EvaluatedSamples(test, torch.arange(len(test))), torch.arange(min(2, len(test))))
    if name == row.NEAREST_LABELS:
        return nearest_labels_row(training, context.splits["all"], example, {})
    if name == row.CLASS_MEAN:
        return from_run.class_mean_row(from_run.class_means(subject, training, example))
    if name == row.TEMPERATURE:
        known = _known(context)
        return temperature_row(known.temperature, normalised=known.normalised)
    found = requested_row(context, subject, name) if name in TRAINED else None
    if found is None:
        found = next((one for one in from_run.extra_rows(context, set()) if one.name == name), None)
    if not isinstance(found, Row):
        raise ArtifactError(
            f"the row {name!r} is not there any more{f': {found}' if found else ''}", "run: ocd evaluate --force"
        )
    return found
