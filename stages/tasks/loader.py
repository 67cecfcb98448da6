"""From settings to a Task, with the checks a first batch allows."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.foundation.config import TaskTable
from stages.foundation.errors import DataError, TaskError
from stages.foundation.trees import Tree, batch_size, leaves, tree_map
from stages.per_sample.single_precision import HALF
from stages.tasks.data import Split, require_tensors, split_rows
from stages.tasks.losses import LabelError
from stages.tasks.modules import load_object
from stages.tasks.protocol import Task, uses_default
from stages.tasks.supervised import SupervisedTask
from stages.tasks.user_code import user_code


def load_task(settings: TaskTable, root: Path, *, condition_on_x: bool = False) -> Task:
    """The task `[task]` declares: an instance of the user's class, or a SupervisedTask.

    Args:
        settings: `[task]`.
        root: the folder of `ocd.toml`.
        condition_on_x: whether x is a field of the conditioning, too.

    Raises:
        SettingsError, TaskError: the code it names does not import, lacks a name, raises, or is no Task.
    """
    task = SupervisedTask(settings, root) if settings.class_ is None else _own_task(settings, root)
    task.condition_on_x = condition_on_x
    return task


def _own_task(settings: TaskTable, root: Path) -> Task:
    make = load_object(root, settings.class_, "task.class")
    with user_code(settings.class_):
        task = make(**settings.args)
    needed = ("model", "train", "test", "loss")
    missing = [name for name in needed if getattr(type(task), name, None) in (None, getattr(Task, name))]
    if missing or not isinstance(task, Task):
        lacks = f"lacks {', '.join(missing)}" if missing else "does not derive from stages.tasks.protocol.Task"
        raise TaskError(f"{settings.class_} {lacks}", "see the class Task for what a task needs")
    return task


def load_splits(task: Task, settings: TaskTable, seed: int) -> dict[str, Split]:
    """The rows of each split: `train` (what the base learns from), `validation` and `all` (the training set as given).

    Where the task has no validation set, a seeded part of the training set is held out of `train`; `validation` then
    numbers rows of the training set too.
    """
    with user_code("train()"):
        dataset = task.train()
        held_out = task.validation()
    whole = Split(dataset, name="train")
    if held_out is not None:
        return {"train": whole, "all": whole, "validation": Split(held_out, name="validation")}
    seed = seed if settings.validation_seed is None else settings.validation_seed
    train, validation = split_rows(len(whole), settings.validation_fraction, seed)
    return {"train": whole.select(train), "validation": whole.select(validation), "all": whole}


def load_test(task: Task) -> Split:
    """The test split."""
    with user_code("test()"):
        return Split(task.test(), name="test")


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def forward(task: Task, model: nn.Module, x: Tree) -> Tree:
    """The task's forward pass; what it raises is the user's.

    A model of half or double precision gets its inputs in its own dtype, unless the task has a forward pass of its own; outputs
    of half precision are float32 for whatever comes after.

    Raises:
        TaskError: it raised, or returned other than tensors with a row for each sample.
    """
    dtype = _input_dtype(model) if uses_default(task, "forward") else None
    if dtype is not None:
        x = tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, x)
    with user_code("the model's forward pass"), _recurrent_gradients(model):
        output = task.forward(model, x)
    require_tensors(output, batch_size(x))
    if not torch.is_grad_enabled():
        # A forward pass may switch them on for itself.
        output = tree_map(torch.detach, output)
    return tree_map(lambda leaf: leaf.float() if leaf.dtype in HALF else leaf, output)


def _input_dtype(model: nn.Module) -> torch.dtype | None:
    """What inputs have to be cast to; None: nothing, they are float32."""
    found = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    half = [dtype for dtype in HALF if dtype in found]
    return half[0] if half else torch.float64 if found == {torch.float64} else None


def _recurrent_gradients(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    """cuDNN has no gradient of recurrent layers in eval mode; torch's own kernels have."""
    if not torch.is_grad_enabled() or model.training or not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(enabled=False)


def losses(task: Task, output: Tree, y: Tree) -> Tensor:
    """The task's loss, checked to be one value per sample, (B,).

    Raises:
        TaskError: another shape, or no tensor.
    """
    if any(leaf.dtype == torch.float64 for leaf in leaves(output).values()):
        y = tree_map(lambda leaf: leaf.double() if leaf.dtype == torch.float32 else leaf, y)
    with user_code("the loss"):
        values = task.loss(output, y)
    hint = 'with torch losses use reduction="none" and average over all but the first axis'
    return one_per_sample(values, batch_size(output), "the loss returned {}", hint)


def one_per_sample(values: Any, count: int, said: str, hint: str) -> Tensor:
    """A tensor (B,) of the user's, checked; `said` has {} where the shape it has goes.

    Raises:
        TaskError: another shape, or no tensor.
    """
    if not isinstance(values, Tensor) or values.shape != (count,):
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise TaskError(
            f"{said.replace('{}', str(shape))} for a batch of {count}, expected one value per sample, ({count},)",
            hint,
        )
    return values


@contextlib.contextmanager
def naming_rows(split: Split, positions: Sequence[int] | Tensor) -> Iterator[None]:
    """Say of a label that cannot be which row of which split it is.

    Raises:
        DataError: with the row.
    """
    try:
        yield
    except LabelError as error:
        row = int(split.rows[torch.as_tensor(positions)][error.row])
        raise DataError(f"{split.name}: y[{row}]: {error.message}", error.hint) from error
