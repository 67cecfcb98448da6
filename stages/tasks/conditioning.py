"""From inputs to the conditioning the networks see: the captured I(x), or the task's own fields."""

from torch import Tensor, nn

from stages.errors import TaskError
from stages.tasks.loader import forward
from stages.tasks.protocol import Task
from stages.tasks.user_code import user_code
from stages.trees import Tree, batch_size
from stages.weights.capture import capture, reduce_fields
from stages.weights.layer import Layer


def condition(task: Task, model: nn.Module, layer: Layer, x: Tree) -> tuple[Tree, dict[str, Tensor], dict[str, str]]:
    """The base's output and the conditioning of a batch (Eq. 7), label-free.

    Args:
        task: gives the forward pass, and may give its own fields or smaller ones.
        model: the base, in eval mode.
        layer: the selected layer.
        x: inputs (B, …).

    Returns:
        the output (B, …); the fields by name, each (B, …) float32; and how wide fields were made smaller.

    Raises:
        TaskError: the task's fields are no tensors of B rows.
    """
    output, captured = capture(model, layer, lambda net, batch: forward(task, net, batch), x)
    with user_code("reduce()"):
        fields, notes = reduce_fields(captured, type(layer.module(model)), task.reduce)
    with user_code("conditioning()"):
        own = task.conditioning(x, output, fields)
    if own is None:
        return output, fields, notes
    count = batch_size(x)
    for name, value in own.items():
        if not isinstance(value, Tensor) or value.shape[:1] != (count,):
            raise TaskError(
                f"conditioning() gave {name} of shape {tuple(getattr(value, 'shape', ()))} for a batch of {count}",
                "each field needs one row per sample",
            )
    return output, {name: value.detach().float() for name, value in own.items()}, {}
