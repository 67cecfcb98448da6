"""Models, losses and datasets with one thing wrong each, beside good ones."""

import torch
import torch.nn.functional as F
from torch import nn


def net(width=6):
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))


# Models


def helper():
    raise KeyError("no such part")


def unbuildable():
    return helper()


def a_number():
    return 3


class Raising(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)

    def forward(self, x):
        raise ValueError("cannot")


def too_wide():
    return nn.Linear(5, 3)


def batch_statistics():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3))


class Centred(nn.Linear):
    """Subtracts the mean over the batch."""

    def __init__(self):
        super().__init__(4, 3)

    def forward(self, x):
        found = super().forward(x)
        return found - found.mean(0)


# Losses


def loss(output, y):
    return F.cross_entropy(output, y, reduction="none")


def one_value(output, y):
    return F.cross_entropy(output, y)


def a_column(output, y):
    return loss(output, y)[:, None]


def no_tensor(output, y):
    return 3.0


def raising(output, y):
    return output.nothing


def not_a_number(output, y):
    return loss(output, y) * float("nan")


def detached(output, y):
    return loss(output, y).detach()


def constant(output, y):
    return torch.ones(len(y))


# Datasets


class RaisingRow:
    def __len__(self):
        return 9

    def __getitem__(self, index):
        if index == 5:
            raise OSError("row is unreadable")
        return torch.zeros(4), 0


def no_length():
    return iter([(torch.zeros(4), 0)])


def empty():
    return []


def one_sample():
    return [(torch.zeros(4), 0)]


def no_pairs():
    return [torch.zeros(4)] * 9


def ragged():
    return [(torch.zeros(4 + i), 0) for i in range(9)]


def unreachable():
    raise OSError("server away")


def label_too_large():
    return [(torch.zeros(4), 3 * (i == 2)) for i in range(9)]


def mixing_in_large_batches(output, y):
    losses = F.cross_entropy(output, y, reduction="none")
    return losses * losses.mean() if len(y) > 8 else losses
