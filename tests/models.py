"""Models of many kinds, small: perceptrons, convolutions, attention, recurrent ones."""

import torch
from overfitters import Custom, random
from torch import nn


def batch_norm(channels):
    """Statistics and weights as training leaves them: no two channels alike."""
    norm = nn.BatchNorm2d(channels)
    norm.running_mean.copy_(random(channels, seed=7))
    norm.running_var.copy_(random(channels, seed=8).square() + 0.5)
    nn.init.normal_(norm.weight, 1, 0.2)
    nn.init.normal_(norm.bias, 0, 0.2)
    return norm


class Block(nn.Module):
    """A residual block, in place as torchvision's."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), batch_norm(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), batch_norm(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        h += x
        return self.relu(h)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), batch_norm(4), nn.ReLU(inplace=True))
        self.blocks, self.head = nn.Sequential(Block(4), Block(4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Attending(nn.Module):
    """Patches, attention and an mlp with skip connections, a class token, and a head on it."""

    def __init__(self):
        super().__init__()
        self.patch, self.token = nn.Conv2d(1, 8, 2, 2), nn.Parameter(torch.randn(1, 1, 8))
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp, self.head = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)), nn.Linear(8, 3)

    def forward(self, x):
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(x), -1, -1), h], dim=1)
        n = self.norm1(h)
        h = h + self.attention(n, n, n, need_weights=False)[0]
        h = h + self.mlp(self.norm2(h))
        return self.head(h[:, 0])


def lenet():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3),
    )  # fmt: skip


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def recurrent(kind):
    return Custom(lambda self, x: self.head(self.rnn(x)[0][:, -1]), rnn=kind(4, 5, batch_first=True), head=nn.Linear(5, 3))


def one_by_one(self, x):
    return torch.stack([self.fc(row) for row in x]).tanh()


def dense(run):
    return lambda: Custom(run, fc=nn.Linear(3, 3), head=nn.Linear(3, 3))


VECTORS = random(5, 3)
