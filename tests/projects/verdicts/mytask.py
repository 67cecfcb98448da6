"""Tasks whose verdict is known beforehand, with data of their own for each seed."""

import torch
from torch import nn

from stages.foundation.seeds import generator
from stages.tasks.data import ArrayDataset
from stages.tasks.losses import REGRESSION, mse
from stages.tasks.protocol import Task


class Planted(Task):
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

    def train(self):
        return self.points("train")

    def validation(self):
        return self.points("validation")

    def test(self):
        return self.points("test")

    def loss(self, output, y):
        return mse(output, y)
