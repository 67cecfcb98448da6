"""From settings to a Task, with the checks a first batch allows."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.foundation.config import TaskTable
from stages.foundation.errors import ComputeError, DataError, TaskError
from stages.foundation.trees import Tree, batch_size, leaves, take, to_device, tree_map
from stages.per_sample.single_precision import HALF
from stages.tasks.data import ArrayDataset, Split, require_tensors, split_rows
from stages.tasks.losses import CLASSIFICATION, LabelError, check_labels
from stages.tasks.protocol import Task, uses_default
from stages.tasks.supervised import SupervisedTask
from stages.tasks.user_code import load_object, user_code
from stages.tasks.views import any_views

LABELS_AT_ONCE = 1 << 16


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
    train, validation = split_rows(len(whole), settings.validation_fraction, seed)
    return {"train": whole.select(train), "validation": whole.select(validation), "all": whole}


def load_test(task: Task) -> Split:
    """The test split."""
    with user_code("test()"):
        return Split(task.test(), name="test")


def forward(task: Task, model: nn.Module, x: Tree) -> Tree:
    """The task's forward pass; what it raises is the user's.

    A model of half precision gets its inputs in its own dtype, unless the task has a forward pass of its own; its outputs are
    float32 for whatever comes after.
    """
    half = next((p.dtype for p in model.parameters() if p.dtype in HALF), None) if uses_default(task, "forward") else None
    if half is not None:
        x = tree_map(lambda leaf: leaf.to(half) if leaf.is_floating_point() else leaf, x)
    with user_code("the model's forward pass"), _recurrent_gradients(model):
        output = task.forward(model, x)
    require_tensors(output, "the model")
    return tree_map(lambda leaf: leaf.float() if leaf.dtype in HALF else leaf, output)


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


def check_task(task: Task, model: nn.Module, split: Split) -> None:
    """One batch through model and loss, before anything costly.

    Raises:
        TaskError: a loss that is not one value per sample, or a model that mixes samples in eval mode.
        ComputeError: a loss that is not finite.
        DataError: labels out of range; the row is named.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    x, y = (to_device(tree, device) for tree in split.batch(range(min(4, len(split)))))
    model.eval()
    with torch.no_grad():
        # A copy for each pass: the model may work in place on what it is given.
        output = forward(task, model, tree_map(torch.clone, x))
        if task.kind == CLASSIFICATION and isinstance(split.dataset, ArrayDataset):
            _check_all_labels(split, output)
        with naming_rows(split, range(min(4, len(split)))):
            values = losses(task, output, y)
        if not torch.isfinite(values).all():
            row = int(split.rows[int((~torch.isfinite(values)).nonzero()[0])])
            raise ComputeError(
                f"the loss of {split.name}[{row}] is {float(values[~torch.isfinite(values)][0])}",
                "mend the loss, the weights or that sample",
            )
        if batch_size(x) > 1:
            _check_independent(task, model, x, output)
    if any(parameter.requires_grad for parameter in model.parameters()):
        # Of one sample, and of what a gradient step shows of it: what autograd keeps of a large one fills the memory.
        x, y = (to_device(tree, device) for tree in any_views(task, *split.batch([0])))
        with torch.enable_grad():
            if not losses(task, forward(task, model, x), y).requires_grad:
                raise TaskError(
                    "the loss does not depend on the model's weights",
                    "let it keep its gradient: no detach(), no item(), no numpy",
                )


def _check_all_labels(split: Split, output: Tree) -> None:
    """The row of the first label out of range, over the whole split rather than a batch."""
    logits = next(iter(leaves(output).values()))
    for start in range(0, len(split), LABELS_AT_ONCE):
        positions = range(start, min(len(split), start + LABELS_AT_ONCE))
        y = split.labels(positions)
        if y is None or y.is_floating_point() or y.dim() != logits.dim() - 1 or logits.shape[1] <= 1:
            return
        with naming_rows(split, positions):
            check_labels(y, logits.shape[1])


MIXES = "OCD needs a model whose samples do not interact; normalise with running statistics, not the batch's"


def _check_independent(task: Task, model: nn.Module, x: Tree, output: Tree) -> None:
    """Compare a batch with its samples one by one; batched and single products differ by rounding, hence 1e-3."""
    for index in range(batch_size(x)):
        try:
            single = forward(task, model, tree_map(torch.clone, take(x, slice(index, index + 1))))
        except TaskError as error:
            raise TaskError(
                f"the model mixes samples in eval mode: it takes a batch of {batch_size(x)}, "
                f"but not a sample alone: {error.message}",
                MIXES,
            ) from error
        for path, leaf in leaves(single).items():
            whole = leaves(output)[path]
            if whole.shape[:1] != (batch_size(x),) or whole.shape[1:] != leaf.shape[1:]:
                raise TaskError(
                    f"the model's output has shape {tuple(whole.shape)} for a batch of {batch_size(x)}",
                    "its first axis must be the sample",
                )
            difference = (whole[index] - leaf[0]).abs().max() if leaf.numel() else torch.zeros(())
            if difference > 1e-3 * (1 + whole.abs().max()):
                raise TaskError(
                    "the model mixes samples in eval mode: "
                    f"alone, a sample's output differs by {float(difference):.3g} from its output in a batch",
                    MIXES,
                )
