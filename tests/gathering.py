"""What the tests of metrics share: tasks of each kind, and the figures of a row."""

import numpy as np
import torch

from stages.evaluation.metrics import Gathered
from stages.tasks.losses import binary_accuracy, binary_cross_entropy, cross_entropy, mean_binary_probability, mse
from stages.tasks.protocol import Task

# Sums in another order, in float64.
ROUNDING = 1e-12
SAMPLES, CLASSES, MEMBERS = 40, 3, 5


def labels_of(*shape, seed=0, classes=CLASSES):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


class Classes(Task):
    kind = "classification"

    def loss(self, output, y):
        return cross_entropy(output, y)


class Binary(Task):
    kind = "classification"

    def loss(self, output, y):
        return binary_cross_entropy(output, y)

    def metrics(self, output, y):
        return {"accuracy": binary_accuracy(output, y)}

    def combine(self, outputs):
        return mean_binary_probability(outputs)


class Numbers(Task):
    kind = "regression"

    def loss(self, output, y):
        return mse(output, y)


class Other(Task):
    def loss(self, output, y):
        return mse(output, y)


class Bare(Numbers):
    """Its loss and metrics take whatever there is."""

    def loss(self, output, y):
        return (output["a"] if isinstance(output, dict) else output).reshape(len(y), -1).sum(1)

    def metrics(self, output, y):
        return {}


def gathered(task, members, y, *, variance=None, batch=17):
    """What comes of (E, N, …) in batches of unequal sizes."""
    found = Gathered(task, variance)
    for start in range(0, len(y), batch):
        part = members[:, start : start + batch]
        found.add(part, task.combine(part), y[start : start + batch])
    return found


def figures(found):
    """Over all samples, by name."""
    statistics, samples = found.statistics(), len(found.values("loss"))
    return {name: float(statistic(np.full((1, samples), 1 / samples))[0]) for name, statistic in statistics.items()}
