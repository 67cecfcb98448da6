"""Tasks where it is known beforehand what OCD can do."""

import torch
from torch import nn

from stages.foundation.seeds import generator
from stages.tasks.data import ArrayDataset
from stages.tasks.losses import CLASSIFICATION, REGRESSION, cross_entropy, mse
from stages.tasks.protocol import Task


class Hopeless(Task):
    """Labels independent of x: nothing about a sample tells its delta."""

    kind = CLASSIFICATION

    def model(self):
        return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))

    def points(self, name, count):
        draw = generator("planted", name)
        return ArrayDataset(torch.randn(count, 6, generator=draw), torch.randint(3, (count,), generator=draw))

    def train(self):
        return self.points("train", 300)

    def validation(self):
        return self.points("validation", 200)

    def test(self):
        return self.points("test", 300)

    def loss(self, output, y):
        return cross_entropy(output, y)


class Planted(Task):
    """The label is a known function of what the layer sees, which the base, being linear, does not express: whoever looks at
    the layer's input knows the sign of each sample's error."""

    kind = REGRESSION

    def model(self):
        return nn.Sequential(nn.Linear(3, 3, bias=False))

    def points(self, name, count):
        x = torch.randn(count, 3, generator=generator("planted", name))
        return ArrayDataset(x, torch.stack([x[:, 0].sign() * x[:, 1], x[:, 0].abs(), x[:, 2]], dim=1))

    def train(self):
        return self.points("train", 400)

    def validation(self):
        return self.points("validation", 200)

    def test(self):
        return self.points("test", 200)

    def loss(self, output, y):
        return mse(output, y)
