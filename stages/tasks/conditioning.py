"""From inputs to the conditioning the networks see: the captured I(x), or the task's own fields."""

import re

import torch.nn.functional as F
from torch import Tensor, nn

from stages.foundation.errors import SettingsError, TaskError
from stages.foundation.trees import Tree, batch_size, flat_output, leaves, take
from stages.per_sample.capture import WIDEST, capture, reduce_fields
from stages.per_sample.layer import Layer
from stages.tasks.loader import forward
from stages.tasks.protocol import Task
from stages.tasks.user_code import user_code

# The field that `condition_on_x` adds.
INPUT = "x"


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
    output, captured = capture(model, layer, lambda net, batch: forward(task, net, batch), x, task.watched)
    return output, *fields_of(task, type(layer.module(model)), x, output, captured)


def fields_of(
    task: Task, layer_kind: type[nn.Module], x: Tree, output: Tree, captured: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The conditioning fields of a pass that has been captured.

    Args:
        task: may give its own fields or smaller ones.
        layer_kind: the type of the layer's module.
        x: inputs (B, …).
        output: the base's output (B, …).
        captured: layer_input, activation, base_output and what is watched, each (B, …).

    Returns:
        the fields by name, each (B, …) float32; and how wide fields were made smaller.

    Raises:
        TaskError: the task's fields are no tensors of B rows.
    """
    if task.condition_on_x:
        captured = captured | {INPUT: _numbers(x)}
    with user_code("conditioning()"):
        own = task.conditioning(x, output, captured)
    if own is None:
        with user_code("reduce()"):
            fields, notes = reduce_fields(captured, layer_kind, task.reduce)
        return {name: _rows(value) for name, value in fields.items()}, notes
    if task.condition_on_x:
        raise SettingsError(
            "collect.condition_on_x = true beside a conditioning() of the task's own, which has the last word",
            "leave it out, and let conditioning() give x itself",
        )
    _check_own(own, batch_size(x))
    return {name: _rows(value.detach().float()) for name, value in own.items()}, {}


def _check_own(fields: dict[str, Tensor], count: int) -> None:
    """Refuse fields of the task's own that are not one row per sample, or have names that the store cannot have."""
    for name, value in fields.items():
        if not isinstance(value, Tensor) or value.shape[:1] != (count,):
            raise TaskError(
                f"conditioning() gave {name} of shape {tuple(getattr(value, 'shape', ()))} for a batch of {count}",
                "each field needs one row per sample",
            )
        if not re.fullmatch(r"[A-Za-z]\w*", name):
            raise TaskError(f"conditioning() gave a field named {name!r}", "names are letters, digits and underscores")


def _numbers(x: Tree) -> Tensor:
    """What a network can see of inputs: one tensor as it is, several side by side; pictures (B, C, H, W) of more numbers than a
    field may have are averaged over squares until they fit.

    Raises:
        SettingsError: they hold integers.
    """
    parts = leaves(x)
    if any(not part.is_floating_point() for part in parts.values()):
        raise SettingsError(
            "collect.condition_on_x = true: x holds integers, which say nothing as numbers",
            "leave it out, or give conditioning()",
        )
    if len(parts) > 1:
        return flat_output(x)
    value = next(iter(parts.values()))
    if value.dim() == 4 and value[0].numel() > WIDEST:
        return F.adaptive_avg_pool2d(value, max(1, int((WIDEST / value.shape[1]) ** 0.5)))
    return value


def _rows(value: Tensor) -> Tensor:
    """A field with at least one axis beside the sample's."""
    return value if value.dim() > 1 else value.unsqueeze(1)


def check_condition(task: Task, model: nn.Module, layer: Layer, x: Tree) -> None:
    """Compare the conditioning of a batch with that of its samples alone.

    Raises:
        TaskError: they differ: the layer does not have the sample on its first axis.
    """
    together = condition(task, model, layer, x)[1]
    for i in range(batch_size(x)):
        alone = condition(task, model, layer, take(x, slice(i, i + 1)))[1]
        for name, value in together.items():
            same = value[i : i + 1].shape == alone[name].shape
            # Batched and single products differ by rounding.
            if not same or (value[i] - alone[name][0]).abs().max() > 1e-3 * (1 + value.abs().max()):
                raise TaskError(
                    f"{name} of {layer.name} is not one row per sample: its module sees {tuple(value.shape)} for a batch of "
                    f"{batch_size(x)}, with the sample on another axis than the first",
                    "choose another layer with --set select-layer.layer=NAME, or give conditioning() in a Task class",
                )
