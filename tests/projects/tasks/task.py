"""Tasks of one's own, each with something to say that a declared one cannot."""

import torch
from torch import nn

from stages.tasks.losses import CLASSIFICATION, cross_entropy
from stages.tasks.protocol import Task
from stages.tasks.toy import Spirals


class Own(Task):
    """The least there can be."""

    kind = CLASSIFICATION

    def model(self):
        return nn.Linear(2, 2)

    def train(self):
        return [(torch.tensor([float(i), 1.0]), i % 2) for i in range(12)]

    def test(self):
        return self.train()

    def loss(self, output, y):
        return torch.nn.functional.cross_entropy(output, y, reduction="none")


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(2, 5), nn.Linear(2, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return {"logits": self.head(torch.tanh(self.left(x["a"]) + self.right(x["b"])))}


class Noisy(torch.utils.data.Dataset):
    def __init__(self, count, seed):
        draw = torch.Generator().manual_seed(seed)
        self.x, self.y = torch.randn(count, 4, generator=draw), torch.arange(count) % 3

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index] + 0.1 * torch.randn(4), self.y[index]


class Pairs(Noisy):
    def __getitem__(self, index):
        return {"a": self.x[index, :2], "b": self.x[index, 2:]}, self.y[index]


class Paired(Task):
    kind = CLASSIFICATION

    def model(self):
        return Two()

    def train(self):
        return Pairs(40, 0)

    def test(self):
        return Pairs(12, 1)

    def loss(self, output, y):
        return cross_entropy(output["logits"], y)

    def metrics(self, output, y):
        return {"cross_entropy": self.loss(output, y)}

    def view(self, x, y, generator):
        return {"a": x["a"] + 0.01 * torch.randn(2, generator=generator), "b": x["b"]}, y

    def conditioning(self, x, output, captured):
        return {"both": torch.cat([x["a"], x["b"]], dim=1), "layer_input": captured["layer_input"]}


class Normed(Task):
    kind = CLASSIFICATION

    def model(self):
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

    def train(self):
        return Noisy(40, 0)

    def test(self):
        return Noisy(12, 1)

    def loss(self, output, y):
        return cross_entropy(output, y)

    def metrics(self, output, y):
        return {"sometimes": torch.where(y == 0, float("nan"), 1.0), **super().metrics(output, y)}

    def conditioning(self, x, output, captured):
        return {"keys": x.sum(1), "wide": captured["layer_input"]}


class Trained(Normed):
    def train_base(self, model, train, validation, **options):
        assert model.training
        x, _ = train.batch(range(len(train)))
        for _ in range(20):
            model(x)


class ExtraRow(Spirals):
    """A row of its own, under any name."""

    def __init__(self, row, **args):
        super().__init__(**args)
        self.row = row

    def extra_rows(self, model, train, validation, seed, device):
        x, y = validation.batch(range(8))
        assert x.shape == (8, 2)
        assert y.shape == (8,)
        return {self.row: lambda x: 2 * model(x)}


class NotATask:
    """Has all that a task has, but is none."""

    kind = CLASSIFICATION
    model, train, test, loss = Own.model, Own.train, Own.test, Own.loss


def lacking(name):
    """As `Own`, without one of the methods that have no default."""
    methods = {method: getattr(Own, method) for method in ("model", "train", "test", "loss") if method != name}
    return type("Lacking", (Task,), methods)


LackingModel, LackingTrain, LackingTest, LackingLoss = (lacking(name) for name in ("model", "train", "test", "loss"))
