"""Tasks that name modules to watch and say where samples lie.

Inputs are four numbers; the last, which the labels do not depend on, is by far the widest, and where a sample lies is told by
the others. `early` gives a field of 6,000 numbers, more than are kept.
"""

import os

import torch
from torch import nn

from stages.foundation.seeds import generator
from stages.tasks.data import ArrayDataset
from stages.tasks.losses import REGRESSION, mse
from stages.tasks.protocol import Task


class Wide(nn.Module):
    def forward(self, x):
        return x[:, None, :3].expand(-1, 2000, -1) * torch.arange(2000, device=x.device).view(1, -1, 1)


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.early = nn.ModuleDict({"wide": Wide(), "gate": nn.Linear(4, 5)})
        self.layer = layer
        self.add_module(layer, nn.Linear(4, 6))
        self.head, self.never = nn.Linear(6, 2), nn.Linear(4, 6)

    def forward(self, x):
        small = x / torch.tensor([1.0, 1.0, 1.0, 1000.0], device=x.device)
        gate = torch.sigmoid(self.early["gate"](small)).mean(1, keepdim=True)
        wide = self.early["wide"](small).mean((1, 2)).unsqueeze(1) / 1000
        return self.head(torch.tanh(self.get_submodule(self.layer)(small)) * gate) + wide


class Watching(Task):
    kind = REGRESSION

    def __init__(self, watched=("early.gate", "early.wide"), layer="fc"):
        self.watched, self.layer = tuple(watched), layer

    def model(self):
        return Net(self.layer)

    def points(self, name, count):
        draw = generator("watched", name)
        x = torch.randn(count, 4, generator=draw)
        x[:, 3] *= 1000
        return ArrayDataset(x, torch.stack([x[:, 0].sin(), x[:, 1] * x[:, 2]], dim=1))

    def train(self):
        return self.points("train", 24)

    def validation(self):
        return self.points("validation", 6)

    def test(self):
        return self.points("test", 5)

    def loss(self, output, y):
        return mse(output, y)

    def coordinates(self, x):
        # The environment, for a setting would make what is finished stale.
        shape = os.environ.get("SHAPE", "right")
        return {"right": x[:, :3], "one axis": x[:, 0], "one row": x[:1, :3], "list": x[:, :3].tolist()}[shape]

    def train_base(self, model, train, validation, *, report, **options):
        report.message("the task trains it")
        for step in range(3):
            report.progress(step + 1, 3, "rounds", error=0.5 / (step + 1))


class Conditioned(Watching):
    """With a conditioning of its own."""

    def conditioning(self, x, output, captured):
        assert captured["early_wide"].shape == (len(x), 2000, 3)
        assert set(captured) == {"layer_input", "activation", "base_output", "early_gate", "early_wide"}
        return {"widest": captured["early_wide"].amax(1), "gate": captured["early_gate"]}
