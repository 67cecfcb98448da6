"""Means of a task's metrics and loss over a split."""

import math

import torch
from torch import Tensor, nn

from stages.foundation.trees import Tree, batch_size, to_device
from stages.per_sample.pass_size import largest_output
from stages.tasks.data import Split
from stages.tasks.loader import forward, losses, naming_rows, one_per_sample
from stages.tasks.protocol import Task
from stages.tasks.user_code import user_code

EVALUATION_BATCH = 256
# What a batch's largest tensor may take; samples of many rows go a few at a time.
OUTPUT_BYTES = 256 << 20


def metrics_of(task: Task, output: Tree, y: Tree) -> dict[str, Tensor]:
    """The task's metrics of a batch, each (B,)."""
    with user_code("metrics()"):
        found = task.metrics(output, y)
    count = batch_size(output)
    hint = "average over all but the first axis"
    return {name: one_per_sample(value, count, f"metrics() gave {name} as {{}}", hint) for name, value in found.items()}


def finite(value: float) -> float | None:
    """A mean as JSON can hold it: None where it is not finite, as where a metric has no value for some sample."""
    return value if math.isfinite(value) else None


def mean_metrics(task: Task, model: nn.Module, split: Split, device: torch.device) -> dict[str, float]:
    """Means of the task's metrics over a split, and of its loss under the name "loss"; the model is put in eval mode."""
    totals: dict[str, float] = {}
    model.eval()
    with torch.no_grad():
        first = to_device(split.inputs([0]), device)
        largest = largest_output(model, lambda net, x: forward(task, net, x), first)
        size = max(1, min(EVALUATION_BATCH, OUTPUT_BYTES // max(1, largest)))
        for start in range(0, len(split), size):
            positions = range(start, min(len(split), start + size))
            x, y = split.batch(positions)
            x, y = to_device(x, device), to_device(y, device)
            output = forward(task, model, x)
            with naming_rows(split, positions):
                figures = {**metrics_of(task, output, y), "loss": losses(task, output, y)}
            for name, values in figures.items():
                totals[name] = totals.get(name, 0.0) + float(values.double().sum())
    return {name: total / len(split) for name, total in totals.items()}
