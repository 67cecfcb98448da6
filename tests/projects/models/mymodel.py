"""Base models of many kinds, a loss and a dataset."""

import torch
import torch.nn.functional as F
from torch import nn


def net(width=6):
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))


def wide():
    return net(60)


def with_running_statistics():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


def convolution():
    return nn.Sequential(nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(6, 3))


def pictures():
    return nn.Sequential(nn.Conv2d(1, 3, 1), nn.Conv2d(3, 2, 1))


def words():
    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3))


def half():
    return net().half()


def bfloat16():
    return net().bfloat16()


class HalfBody(nn.Module):
    """Half precision, but for the head."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6).half(), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(x.half()).tanh().float())


class TwoOutputs(nn.Module):
    """Gives a dict."""

    def __init__(self):
        super().__init__()
        self.body, self.side = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return {"logits": self.body(x), "hidden": self.side(x)}


def loss_of_logits(output, y):
    return F.cross_entropy(output["logits"], y, reduction="none")


def plain_loss(output, y):
    return F.cross_entropy(output, y, reduction="none")


class TwoVectors(nn.Module):
    """Its layer sees two vectors a sample."""

    def __init__(self):
        super().__init__()
        self.each, self.head = nn.Linear(2, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.each(x.view(-1, 2, 2)).tanh().mean(1))


class Unused(nn.Module):
    """Of three layers one counts, one is called and one is not."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.uncalled = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        self.unused(x)
        return self.used(x)


class ByColumns(nn.Module):
    """The first axis of what its layer sees is not the sample."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(1, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.inner(x.t().unsqueeze(2)).mean(0))


class Attending(nn.Module):
    """Its layer is a packed projection."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        x = x.unsqueeze(1) * F.one_hot(torch.arange(3, device=x.device), 4).float()
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(1, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.rnn(x.unsqueeze(2))[0][:, -1])


class Reader(nn.Module):
    """An embedding, a recurrent layer and a head."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 6)
        self.body = nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.body(self.words(x))[0][:, -1])


class Counting(nn.Module):
    """Its layer is a plain parameter, and it goes round as often as the inputs say, which no vmap can."""

    def __init__(self):
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 3)

    def forward(self, x):
        h, rounds = (x @ self.w).tanh(), 1 + (x[:, 0] > 0).long()
        for number in range(int(rounds.max())):
            h = torch.where((number < rounds).unsqueeze(1), h.sin(), h)
        return self.head(h)
