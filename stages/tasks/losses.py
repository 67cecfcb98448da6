"""The built-in losses, metrics and ways to combine an ensemble's outputs, each giving one value per sample."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.foundation.bounds import are_within, keep_bounds
from stages.foundation.errors import DataError, TaskError
from stages.foundation.trees import Tree, leaves, parts_of


class LabelError(DataError):
    """A label that cannot be, in row `row` of the batch."""

    def __init__(self, row: int, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.row = row


def _first_row(wrong: Tensor) -> int:
    return int(wrong.reshape(len(wrong), -1).any(1).nonzero()[0])


def _per_sample(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1) if values.dim() > 1 else values


def kind_of(output: Tree) -> str:
    """What a model returned, in words: "a tensor (4, 10)", "a dict of logits (4, 10), hidden (4, 64)"."""
    listed = ", ".join(f"{path} {tuple(leaf.shape)}".strip() for path, leaf in leaves(output).items())
    return f"a tensor {listed}" if isinstance(output, Tensor) else f"a {type(output).__name__} of {listed}"


def require_one_tensor(output: Tree, wanted_by: str) -> None:
    """Refuse an output of several parts where one tensor is needed.

    Raises:
        TaskError: it is a tuple, a dict or the like; the entry to take is named.
    """
    if isinstance(output, Tensor):
        return
    parts = parts_of(output)
    key = next((key for key in parts if key == "logits"), next(iter(parts)))
    entry = f"output[{key!r}]" if isinstance(output, (tuple, list, Mapping)) else f"output.{key}"
    raise TaskError(
        f"{wanted_by} needs one tensor, and the model returns {kind_of(output)}",
        f'write a loss of your own, def my_loss(output, y): return F.cross_entropy({entry}, y, reduction="none"), '
        'and set task.loss = "mymodel:my_loss"',
    )


def cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy −log softmax(output)[y], in nats.

    Args:
        output: logits (B, C) or (B, C, …).
        y: class numbers (B,) or (B, …), integers in [0, C).

    Returns:
        (B,), the mean over any further axes.

    Raises:
        DataError: a label is no integer or out of range.
    """
    if y.is_floating_point():
        raise DataError(
            f"cross_entropy needs integer labels, y is {str(y.dtype).removeprefix('torch.')}",
            'save y as integers, or use loss = "mse"',
        )
    if output.dim() < 2 or output.shape[:1] + output.shape[2:] != y.shape:
        raise DataError(
            f"cross_entropy: y of shape {tuple(y.shape)} does not fit an output of shape {tuple(output.shape)}",
            "one class number per sample is expected beside an output (batch, classes)",
        )
    check_labels(y, output.shape[1])
    return _per_sample(F.cross_entropy(output, y.long(), reduction="none"))


def check_labels(y: Tensor, classes: int) -> None:
    """Name a label outside [0, classes).

    Raises:
        DataError: there is one.
    """
    if are_within(y, 0, classes - 1):
        return
    wrong = (y < 0) | (y >= classes)
    if wrong.any():
        label = int(y.flatten()[int(wrong.flatten().nonzero()[0])])
        raise LabelError(
            _first_row(wrong),
            f"label {label} is out of range: the model has {classes} outputs, so labels are 0 … {classes - 1}",
            "mend the labels, or give the model one output per class",
        )
    keep_bounds(y, 0, classes - 1)


def _same_shape(name: str, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    wide = [[size for size in tensor.shape[1:] if size != 1] for tensor in (output, y)]
    if output.shape[:1] == y.shape[:1] and wide[0] == wide[1]:
        # (B,) beside (B, 1), say; axes in another order are no such thing.
        y = y.reshape(output.shape)
    if output.shape != y.shape:
        raise DataError(
            f"{name}: y of shape {tuple(y.shape)} does not fit an output of shape {tuple(output.shape)}",
            "both must have one shape",
        )
    return output, y.to(output.dtype)


def mse(output: Tensor, y: Tensor) -> Tensor:
    """Mean squared error over all but the first axis: (B, …), (B, …) to (B,)."""
    output, y = _same_shape("mse", output, y)
    return _per_sample((output - y).square())


def mae(output: Tensor, y: Tensor) -> Tensor:
    """Mean absolute error over all but the first axis: (B, …), (B, …) to (B,)."""
    output, y = _same_shape("mae", output, y)
    return _per_sample((output - y).abs())


def huber(output: Tensor, y: Tensor) -> Tensor:
    """Huber's loss with threshold 1, mean over all but the first axis: (B, …), (B, …) to (B,)."""
    output, y = _same_shape("huber", output, y)
    return _per_sample(F.huber_loss(output, y, reduction="none"))


def binary_cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of logits (B, …) against probabilities or 0/1 labels (B, …), in nats, mean over all but the first axis.

    Raises:
        DataError: a label lies outside [0, 1].
    """
    given = y
    output, y = _same_shape("binary_cross_entropy", output, y)
    if not are_within(given, 0, 1):
        wrong = (y < 0) | (y > 1)
        if wrong.any():
            raise LabelError(
                _first_row(wrong),
                f"label {float(y[wrong][0]):g} is out of range: binary_cross_entropy needs labels in [0, 1]",
                "mend the labels",
            )
        keep_bounds(given, 0, 1)
    return _per_sample(F.binary_cross_entropy_with_logits(output, y, reduction="none"))


def accuracy(output: Tensor, y: Tensor) -> Tensor:
    """1 where the largest logit (B, C, …) is the label's (B, …), else 0: (B,)."""
    return _per_sample((output.argmax(1) == y).float())


def binary_accuracy(output: Tensor, y: Tensor) -> Tensor:
    """1 where the logit's sign agrees with the 0/1 label, else 0: (B, …), (B, …) to (B,)."""
    output, y = _same_shape("binary_accuracy", output, y)
    return _per_sample(((output > 0) == (y > 0.5)).float())


Loss = Callable[[Tensor, Tensor], Tensor]
CLASSIFICATION, REGRESSION, OTHER = "classification", "regression", "other"

LOSSES: dict[str, tuple[Loss, str, dict[str, Loss]]] = {
    "cross_entropy": (cross_entropy, CLASSIFICATION, {"cross_entropy": cross_entropy, "accuracy": accuracy}),
    "binary_cross_entropy": (
        binary_cross_entropy,
        CLASSIFICATION,
        {"cross_entropy": binary_cross_entropy, "accuracy": binary_accuracy},
    ),
    "mse": (mse, REGRESSION, {"mse": mse, "mae": mae}),
    "mae": (mae, REGRESSION, {"mae": mae, "mse": mse}),
    "huber": (huber, REGRESSION, {"huber": huber, "mse": mse, "mae": mae}),
}


def mean_probability(outputs: Tensor) -> Tensor:
    """Log of the mean probability, log(1/E Σ softmax(output_e)): logits (E, B, C, …) to log-probabilities (B, C, …)."""
    return torch.logsumexp(F.log_softmax(outputs, dim=2), dim=0) - torch.tensor(float(outputs.shape[0])).log()


def mean_binary_probability(outputs: Tensor) -> Tensor:
    """Logit of the members' mean probability: logits (E, B, …) to logits (B, …)."""
    return torch.logsumexp(F.logsigmoid(outputs), dim=0) - torch.logsumexp(F.logsigmoid(-outputs), dim=0)


def mean_output(outputs: Tensor) -> Tensor:
    """Mean of the members' outputs: (E, B, …) to (B, …)."""
    return outputs.mean(0)
