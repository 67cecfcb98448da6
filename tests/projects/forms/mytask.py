"""Tasks of every form."""

import pathlib

import torch
import torch.nn.functional as F
from torch import nn

from stages.foundation.seeds import generator
from stages.tasks.data import ArrayDataset
from stages.tasks.losses import CLASSIFICATION, OTHER, REGRESSION
from stages.tasks.protocol import Task


class Base(Task):
    kind = CLASSIFICATION

    def model(self):
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def loss(self, output, y):
        return F.cross_entropy(output, y, reduction="none")

    def labels(self, x, draw):
        return (x[:, :3] + torch.randn(len(x), 3, generator=draw)).argmax(1)

    def points(self, name, count):
        draw = generator("forms", name)
        x = torch.randn(count, 4, generator=draw)
        return ArrayDataset(x, self.labels(x, draw))

    def train(self):
        return self.points("train", 100)

    def validation(self):
        return self.points("validation", 24)

    def test(self):
        return self.points("test", 30)


class LogProbabilities(Base):
    def model(self):
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.LogSoftmax(1))

    def loss(self, output, y):
        return F.nll_loss(output, y, reduction="none")


class Binary(Base):
    """One number a sample."""

    def model(self):
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0))

    def labels(self, x, draw):
        return (x[:, 0] > 0).float()

    def loss(self, output, y):
        return F.binary_cross_entropy_with_logits(output, y, reduction="none")

    def metrics(self, output, y):
        return {"right": ((output > 0) == (y > 0.5)).float()}


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        hidden = self.body(x).tanh()
        return {"logits": self.head(hidden), "hidden": hidden}


class ADict(Base):
    def model(self):
        return Two()

    def loss(self, output, y):
        return F.cross_entropy(output["logits"], y, reduction="none")

    def metrics(self, output, y):
        return {"accuracy": (output["logits"].argmax(1) == y).float()}


class Pictures(Base):
    """A class for every pixel."""

    def model(self):
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1))

    def points(self, name, count):
        draw = generator("pictures", name)
        x = torch.randn(count // 3, 1, 40, 40, generator=draw)
        return ArrayDataset(x, (x[:, 0] > 0).long() + (x[:, 0] > 1).long())

    def loss(self, output, y):
        return F.cross_entropy(output, y, reduction="none").mean((1, 2))


class Names(Base):
    """Metrics with the names of ocd's own."""

    def metrics(self, output, y):
        own = 2 * F.cross_entropy(output, y, reduction="none")
        return {"loss": own, "brier_score": own, "calibration_error": own}


class NotANumber(Base):
    """A loss that is no number where the output is small."""

    kind = REGRESSION

    def model(self):
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0))

    def labels(self, x, draw):
        return x[:, 0].clamp(-0.5, 0.5)

    def loss(self, output, y):
        return ((output + 1.2).sqrt() - y).square()


class OwnFields(Base):
    kind = OTHER

    def conditioning(self, x, output, captured):
        return {"seen": captured["layer_input"], "given": output}

    def labels(self, x, draw):
        return x[:, :3]

    def loss(self, output, y):
        return (output - y).abs().mean(1)


class FromAFile(Base):
    """Data that only code reads."""

    def points(self, name, count):
        found = super().points(name, count)
        found.x = found.x * float(pathlib.Path(__file__).with_name("scale.txt").read_text())
        return found


class Seen(Base):
    """Its conditioning is a picture, the output and what the layer saw."""

    def conditioning(self, x, output, captured):
        side = torch.cat([x, -x], dim=1)
        picture = side[:, None, :, None] * side[:, None, None, :] * torch.arange(1.0, 4, device=x.device).view(3, 1, 1)
        return {"picture": picture, "given": output, "seen": captured["layer_input"]}


class OneNumber(Names):
    """And one metric that is a single number for the batch."""

    def metrics(self, output, y):
        found = super().metrics(output, y)
        return {"mean": found["loss"].mean(), **found}
