"""What the nearest training samples' labels say, without any model."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.evaluation import rows as row
from stages.evaluation.rows import Row, output_row
from stages.evaluation.stored_deltas import StoredDeltas
from stages.evaluation.subject import Batch
from stages.tasks.classes import OF_CLASSES, logits_of
from stages.tasks.data import Split
from stages.tasks.losses import CLASSIFICATION, REGRESSION


def nearest_labels_row(training: StoredDeltas, split: Split, example: Batch, missing: dict[str, str]) -> Row | str:
    """The vote of the k nearest training samples, of classes one vote more spread over them all, log((n_c + 1/C)/(k + 1)); or
    the mean of their labels; or why there is none.

    Args:
        split: all training samples, which the store's `sample_index` counts.
        example: a few labelled samples.
        missing: as `find_neighbours` gives it.
    """
    if reason := missing.get(row.KINDS[row.NEAREST_LABELS]):
        return reason
    task, output = example.subject.task, example.first.output
    known = split.labels(training.sample_index[training.first_rows[:2]])
    plain = isinstance(output, Tensor) and isinstance(known, Tensor)
    votes = plain and task.kind == CLASSIFICATION and output.dim() == 2 and logits_of(output[: len(known)], known) == OF_CLASSES
    means = plain and task.kind == REGRESSION and known[0].numel() == output[0].numel()
    if not votes and not means:
        return "labels are not one class a sample, nor numbers like the outputs"

    def predict(batch: Batch) -> Tensor:
        near = batch.neighbours(row.IN_X).row
        labels = split.labels(training.sample_index[training.first_rows[near.reshape(-1).cpu()]])
        labels = labels.to(batch.subject.device).view(*near.shape, *labels.shape[1:])
        if not votes:
            return labels.float().mean(1).view_as(batch.first.output)
        classes = batch.first.output.shape[1]
        counts = F.one_hot(labels.long(), classes).sum(1).to(torch.float32)
        return ((counts + 1 / classes) / (near.shape[1] + 1)).log()

    return output_row(row.NEAREST_LABELS, predict)
