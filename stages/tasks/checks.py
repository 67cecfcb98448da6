"""What is tried of a task before anything costly: a few samples through model, loss, metrics and combination."""

import torch
from torch import nn

from stages.foundation.errors import ComputeError, OcdError, TaskError
from stages.foundation.trees import Tree, batch_size, leaves, take, to_device, tree_map
from stages.tasks.data import ArrayDataset, Split
from stages.tasks.independence import FEW, check_independent
from stages.tasks.loader import device_of, forward, losses, naming_rows
from stages.tasks.losses import CLASSIFICATION, check_labels, kind_of
from stages.tasks.model import put_in_eval_mode
from stages.tasks.protocol import Task
from stages.tasks.scoring import metrics_of
from stages.tasks.user_code import user_code
from stages.tasks.views import any_views

LABELS_AT_ONCE = 1 << 16


def check_task(task: Task, model: nn.Module, split: Split) -> None:
    """A few samples through model, loss, metrics and combination, alone and in batches.

    Raises:
        TaskError: a loss or a metric that is not one value per sample, or a model or a loss for which a sample is not the same
            alone as in a batch.
        ComputeError: a loss that is not finite.
        DataError: labels out of range; the row is named.
    """
    first, device = range(min(FEW, len(split))), device_of(model)
    x, y = (to_device(tree, device) for tree in split.batch(first))
    put_in_eval_mode(model)
    with torch.no_grad():
        # A copy: the model may work in place on what it is given.
        output = forward(task, model, tree_map(torch.clone, x))
        if task.kind == CLASSIFICATION and isinstance(split.dataset, ArrayDataset):
            _check_all_labels(split, output)
        with naming_rows(split, first):
            values = losses(task, output, y)
        if not torch.isfinite(values).all():
            row = int(split.rows[int((~torch.isfinite(values)).nonzero()[0])])
            raise ComputeError(
                f"the loss of {split.name}[{row}] is {float(values[~torch.isfinite(values)][0])}",
                "mend the loss, the weights or that sample",
            )
        _check_scoring(task, split, output, y)
        if len(split) > 1:
            check_independent(task, model, split)
    if any(parameter.requires_grad for parameter in model.parameters()):
        _check_gradient(task, model, split)


def _check_scoring(task: Task, split: Split, output: Tree, y: Tree) -> None:
    """Metrics of the first samples, and of two members' combination for one of them."""
    one = take(output, slice(0, 1))
    with user_code("combine()"):
        combined = task.combine(tree_map(lambda leaf: torch.stack([leaf, leaf]), one))
    if not leaves(combined):
        raise TaskError(
            "the model returns integers alone, of which an ensemble has no mean",
            "return numbers before rounding or argmax, such as logits, or write a Task class with a combine() of its own",
        )
    with naming_rows(split, range(batch_size(output))):
        metrics_of(task, output, y)
        metrics_of(task, combined, take(y, slice(0, 1)))


def _check_gradient(task: Task, model: nn.Module, split: Split) -> None:
    # Of one sample, and of what a gradient step shows of it: what autograd keeps of a large one fills the memory.
    x, y = (to_device(tree, device_of(model)) for tree in any_views(task, *split.batch([0])))
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


def _takes(task: Task, output: Tree, split: Split) -> bool:
    """Whether the loss of the user's own takes what the model returns in train mode."""
    try:
        losses(task, output, to_device(split.labels(range(batch_size(output))), next(iter(leaves(output).values())).device))
    except OcdError:
        return False
    return True


def check_training_output(task: Task, model: nn.Module, split: Split) -> None:
    """The model must return in train mode what it returns in eval mode, for the default trainer.

    Args:
        task: gives the forward pass.
        model: of no further use.
        split: gives inputs.

    Raises:
        TaskError: it returns another structure.
    """
    found = {}
    for mode in ("eval", "train"):
        with user_code(f"{mode}()"), torch.no_grad():
            model.train(mode == "train")
            found[mode] = forward(task, model, to_device(split.inputs(range(min(FEW, len(split)))), device_of(model)))
    if leaves(found["eval"]).keys() != leaves(found["train"]).keys() and not _takes(task, found["train"], split):
        raise TaskError(
            f"the model returns {kind_of(found['train'])} in train mode, and {kind_of(found['eval'])} in eval mode: "
            "the default trainer cannot tell which part the loss is for",
            "import trained weights with --weights FILE, or write a Task class with a train_base() of its own",
        )
