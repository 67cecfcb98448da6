"""The best output that is the same for every sample: what a model has to beat, whatever the loss."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.foundation.seeds import generator, global_seed
from stages.foundation.trees import Tree, batch_size, to_device
from stages.tasks.data import Split
from stages.tasks.loader import device_of, forward, losses
from stages.tasks.protocol import Task

# Training samples that it is found on, at most, and so many numbers of outputs; a larger output is not tried.
MOST_SAMPLES, MOST_NUMBERS, LARGEST_OUTPUT = 2000, 1 << 22, 1_000_000
# Targets whose mean is so large, or whose standard deviation is so many times larger or smaller than 1, are worth scaling.
FAR = 3.0
# Of samples that are judged at once.
NUMBERS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Constant:
    """How good a constant output is.

    Attributes:
        loss: its mean over the samples judged.
        targets: mean and standard deviation of y over training samples, where y has the output's shape.
    """

    loss: float
    targets: tuple[float, float] | None


def best_constant(task: Task, model: nn.Module, train: Split, judged: Split, seed: int) -> Constant | None:
    """The constant output of the lowest mean loss over training samples, and its loss on the samples judged; the model, in eval
    mode, only gives the output's shape. Any constant bounds what a model is to reach: it need not be the very best.

    Returns:
        None where outputs are no tensors of floats of one shape, or are too large, or where the loss does not take a constant,
        or is no number.
    """
    try:
        with global_seed(seed, "train-base", "constant"):
            return _best_constant(task, model, train, judged, seed)
    except Exception:
        # The user's loss may be made for a model's own outputs alone; that is no fault.
        return None


def is_far_from_unit(mean: float, deviation: float) -> bool:
    """Whether targets are far from what a new model's outputs are like, a few units at most."""
    return deviation > 0 and (abs(mean) > FAR or not 1 / FAR < deviation < FAR)


def _best_constant(task: Task, model: nn.Module, train: Split, judged: Split, seed: int) -> Constant | None:
    device = device_of(model)
    with torch.no_grad():
        output = forward(task, model, to_device(train.inputs([0]), device))
    if not isinstance(output, Tensor) or not output.is_floating_point() or output[0].numel() > LARGEST_OUTPUT:
        return None
    size = max(1, NUMBERS_AT_ONCE // max(1, output[0].numel()))
    count = max(1, min(MOST_SAMPLES, MOST_NUMBERS // max(1, output[0].numel())))
    rows = torch.randperm(len(train), generator=generator(seed, "train-base", "constant"))[:count].sort().values
    labels = [to_device(train.labels(part), device) for part in rows.split(size)]
    targets = _as_outputs(labels, output)
    start = torch.zeros_like(output[0]) if targets is None else targets.mean(0).to(output)
    constant = _minimised(lambda value: _mean_loss(task, value, labels), start)
    with torch.no_grad():
        parts = torch.arange(len(judged)).split(size)
        loss = float(_mean_loss(task, constant, (to_device(judged.labels(part), device) for part in parts)))
    if not math.isfinite(loss):
        return None
    spread = None if targets is None else (float(targets.mean()), float(targets.std(correction=0)))
    return Constant(loss, spread)


def _as_outputs(labels: list[Tree], output: Tensor) -> Tensor | None:
    """y of all samples in the output's shape but for axes of one number, (n, …), in float64; None where it has another."""
    wide = [[size for size in leaf.shape[1:] if size != 1] for leaf in (labels[0], output) if isinstance(leaf, Tensor)]
    if len(wide) < 2 or wide[0] != wide[1]:
        return None
    return torch.cat([y.double().reshape(len(y), *output.shape[1:]) for y in labels])


def _mean_loss(task: Task, constant: Tensor, labels: Iterable[Tree]) -> Tensor:
    total, count = 0.0, 0
    for y in labels:
        rows = batch_size(y)
        # A copy for each sample, as a model gives it: a loss may work in place.
        total = total + losses(task, constant.expand(rows, *constant.shape).clone(), y).double().sum()
        count += rows
    return total / count


def _minimised(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The best point that L-BFGS comes by from `start`."""
    point = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([point], max_iter=100, line_search_fn="strong_wolfe")
    lowest, best = float("inf"), start

    def closure() -> float:
        nonlocal lowest, best
        found = loss(point)
        # Of the point alone: a loss may have parameters, and they may be the model's.
        (point.grad,) = torch.autograd.grad(found, [point])
        value = float(found.detach())
        if value < lowest:
            lowest, best = value, point.detach().clone()
        return value

    optimizer.step(closure)
    return best
