"""A classification whose conditioning is a picture, the output and what the layer saw."""

import torch
from torch import nn

from stages.foundation.seeds import generator
from stages.tasks.data import ArrayDataset
from stages.tasks.losses import CLASSIFICATION, cross_entropy
from stages.tasks.protocol import Task


class Seen(Task):
    kind = CLASSIFICATION

    def model(self):
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def points(self, name, count):
        draw = generator("encoders", name)
        x = torch.randn(count, 4, generator=draw)
        return ArrayDataset(x, (x[:, :3] + torch.randn(count, 3, generator=draw)).argmax(1))

    def train(self):
        return self.points("train", 40)

    def test(self):
        return self.points("test", 12)

    def loss(self, output, y):
        return cross_entropy(output, y)

    def conditioning(self, x, output, captured):
        side = torch.cat([x, -x], dim=1)
        picture = side[:, None, :, None] * side[:, None, None, :] * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
        return {"picture": picture, "given": output, "seen": captured["layer_input"]}
