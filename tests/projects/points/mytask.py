"""A sample is five points and a number at each; two of them are shown at each step."""

import os

import torch
from torch import nn

from stages.foundation.seeds import generator
from stages.tasks.data import ArrayDataset
from stages.tasks.losses import REGRESSION, mse
from stages.tasks.protocol import Task


class WithoutView(Task):
    """All of them are shown."""

    kind = REGRESSION

    def model(self):
        return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(1))

    def points(self, name, count):
        x = torch.randn(count, 5, 3, generator=generator("points", name))
        return ArrayDataset(x, x[..., 0].sin() + x[:, :1, 1])

    def train(self):
        return self.points("train", 18)

    def validation(self):
        return self.points("validation", 6)

    def test(self):
        return self.points("test", 7)

    def loss(self, output, y):
        return mse(output, y)


class Points(WithoutView):
    """The environment spoils a sample."""

    def view(self, x, y, generator):
        shown = torch.randperm(5, generator=generator)[:2]
        if float(x[0, 0]) == float(os.environ.get("SPOILED", "nan")):
            return x[shown] * torch.nan, y[shown]
        return x[shown], y[shown]
