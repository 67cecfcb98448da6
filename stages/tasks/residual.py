"""How far a base's outputs are from the labels, as numbers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.foundation.trees import Tree
from stages.tasks.classes import BINARY, OF_CLASSES, class_probabilities, logits_of
from stages.tasks.losses import CLASSIFICATION
from stages.tasks.protocol import Task

WIDEST = 256


def residual(task: Task, output: Tree, y: Tree) -> Tensor | None:
    """y − f(x), (B, numbers) float32: of classifiers, the labels' indicators minus the probabilities; None where outputs and
    labels have other forms, or more than 256 numbers a sample."""
    if not isinstance(output, Tensor) or not isinstance(y, Tensor) or output[0].numel() > WIDEST:
        return None
    if task.kind == CLASSIFICATION:
        form = logits_of(output, y)
        if form == OF_CLASSES:
            true = F.one_hot(y.reshape(len(y), -1).long(), output.shape[1]).transpose(1, 2)
            return (true - class_probabilities(output, form)).float().flatten(1)
        return (y.reshape(len(y), -1) - torch.sigmoid(output.reshape(len(y), -1))).float() if form == BINARY else None
    if output.numel() != y.numel() or not output.is_floating_point():
        return None
    return (y.reshape(len(y), -1) - output.reshape(len(y), -1)).float()
