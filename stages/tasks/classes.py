"""Class probabilities of a classifier's outputs, where these are logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.foundation.trees import Tree

# Logits of each class beside class numbers; and one logit of each yes-or-no question beside 0/1 labels.
OF_CLASSES, BINARY = "classes", "binary"


def logits_of(output: Tree, y: Tree) -> str | None:
    """What a classifier's outputs are the logits of: `classes` for outputs (B, C, …) beside class numbers (B, …), `binary` for
    outputs beside 0/1 labels of as many numbers; None for other forms, such as probabilities as labels."""
    if not isinstance(output, Tensor) or not isinstance(y, Tensor):
        return None
    if not y.is_floating_point() and output.dim() == y.dim() + 1 and output.shape[1] > 1:
        known = bool(((y >= 0) & (y < output.shape[1])).all())
        return OF_CLASSES if known else None
    soft = y.is_floating_point() and y.dim() > 1 and y.shape[1] > 1 and bool(((y.sum(1) - 1).abs() < 1e-4).all())
    return BINARY if output.numel() == y.numel() and not soft else None


def class_probabilities(output: Tensor, form: str) -> Tensor:
    """The probability of each class, in float64: logits (B, C, …) to (B, C, P), P predictions a sample; of a binary
    classifier's (B, …) to (B, 2, P)."""
    if form == OF_CLASSES:
        return F.softmax(output.double(), dim=1).reshape(*output.shape[:2], -1)
    positive = torch.sigmoid(output.double()).reshape(len(output), 1, -1)
    return torch.cat([1 - positive, positive], dim=1)


def guesses(output: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """The likeliest class and its probability: outputs (B, C, …) or, where binary, (B, …) to int64 and float32, each (B, …)."""
    shape = (len(output), *output.shape[2:]) if form == OF_CLASSES else output.shape
    probability, guess = class_probabilities(output, form).max(1)
    return guess.reshape(shape), probability.float().reshape(shape)
