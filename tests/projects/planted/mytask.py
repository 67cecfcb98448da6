"""Tasks where it is known beforehand what OCD can do."""

import torch
from torch import nn

from stages.foundation.seeds import generator
from stages.tasks.data import ArrayDataset
from stages.tasks.losses import CLASSIFICATION, REGRESSION, cross_entropy, mse
from stages.tasks.protocol import Task


class Hopeless(Task):
    """Labels independent of x: nothing about a sample tells its delta."""

    kind, sizes = CLASSIFICATION, {"train": 300, "validation": 200, "test": 300}

    def __init__(self, draw=0):
        self.key = ("planted", draw) if draw else ("planted",)

    def model(self):
        return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))

    def points(self, name):
        count, draw = self.sizes[name], generator(*self.key, name)
        return ArrayDataset(torch.randn(count, 6, generator=draw), torch.randint(3, (count,), generator=draw))

    def train(self):
        return self.points("train")

    def validation(self):
        return self.points("validation")

    def test(self):
        return self.points("test")

    def loss(self, output, y):
        return cross_entropy(output, y)


class Planted(Hopeless):
    """The label is a known function of what the layer sees, which the base, being linear, does not express: whoever looks at
    the layer's input knows the sign of each sample's error."""

    kind, sizes = REGRESSION, {"train": 400, "validation": 200, "test": 400}

    def model(self):
        return nn.Sequential(nn.Linear(3, 3, bias=False))

    def points(self, name):
        x = torch.randn(self.sizes[name], 3, generator=generator(*self.key, name))
        return ArrayDataset(x, torch.stack([x[:, 0].sign() * x[:, 1], x[:, 0].abs(), x[:, 2]], dim=1))

    def loss(self, output, y):
        return mse(output, y)


class Seeded(Hopeless):
    """A label of `known` parts a function of x that a linear base cannot express, and `noise` parts chance; the base is linear,
    or has a hidden layer, which could express it."""

    kind = REGRESSION

    def __init__(self, seed, known, noise, test=200, hidden=0):
        self.seed, self.known, self.noise, self.hidden = seed, known, noise, hidden
        self.sizes = {"train": 400, "validation": 150, "test": test}

    def model(self):
        if self.hidden:
            return nn.Sequential(nn.Linear(3, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 3))
        return nn.Sequential(nn.Linear(3, 3, bias=False))

    def points(self, name):
        draw = generator("planted verdicts", self.seed, name)
        x = 3 * torch.rand(self.sizes[name], 3, generator=draw) - 1.5
        chance = torch.randn(self.sizes[name], 3, generator=draw)
        bent = torch.stack([x[:, 0].sign() * x[:, 1], x[:, 0].abs() - 0.8, x[:, 2].abs() - 0.8], dim=1)
        return ArrayDataset(x, x.flip(1) + self.known * bent + self.noise * chance)

    def loss(self, output, y):
        return mse(output, y)


class Local(Hopeless):
    """A label with an offset that each cell of x has by chance, or each sample of its own: neighbours tell it, or nobody does.

    Args:
        cells: along each of two axes; 0: the offsets are each sample's own.
        copies: of the first training sample, with other labels.
    """

    kind, sizes = REGRESSION, {"train": 600, "validation": 200, "test": 300}

    def __init__(self, cells=6, copies=0):
        self.cells, self.copies = cells, copies

    def model(self):
        return nn.Sequential(nn.Linear(2, 2, bias=False))

    def points(self, name):
        draw = generator("local", name)
        x = torch.rand(self.sizes[name], 2, generator=draw)
        if self.copies and name == "train":
            x[: self.copies + 1] = x[0]
        chance = torch.randn(len(x), 2, generator=draw)
        if self.cells:
            offsets = torch.randn(self.cells**2, 2, generator=generator("local", "cells"))
            place = (x * self.cells).long().clamp_max(self.cells - 1)
            chance = offsets[place[:, 0] * self.cells + place[:, 1]] + 0.1 * chance
        return ArrayDataset(x, x.flip(1) + chance)

    def loss(self, output, y):
        return mse(output, y)


class Several(Planted):
    """Samples of several rows: each turns its rows by an angle of its own, which the place of its rows tells. A change of
    weights turns all of them; what is pooled over the rows knows none of them."""

    rows = 12

    def points(self, name):
        draw = generator("several", name)
        centre = torch.rand(self.sizes[name], 1, generator=draw) * 4 - 2
        spread = torch.randn(self.sizes[name], self.rows, 2, generator=draw)
        x = torch.cat([centre.unsqueeze(1) + 0.1 * spread[..., :1], spread[..., 1:], torch.ones_like(spread[..., :1])], dim=2)
        y = torch.cat([centre.unsqueeze(1).sin() * x[..., 1:2], centre.unsqueeze(1).cos() * x[..., 1:2], x[..., :1]], dim=2)
        return ArrayDataset(x, y)
