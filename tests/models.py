"""Models of many kinds, small: perceptrons, convolutions, attention, recurrent ones."""

import torch
import torch.nn.functional as F
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


def counting(self, x):
    """As many rounds as a sample asks for; those of the others are masked."""
    rounds = (3 * x[:, 0].abs()).long()
    h = x
    for i in range(int(rounds.max()) + 1):
        h = torch.where((i <= rounds).unsqueeze(1), self.fc(h).tanh(), h)
    return self.head(h)


def of_a_dict(self, x):
    return self.head(self.fc(x["a"]).tanh() * x["b"].unsqueeze(1))


def of_a_tuple(self, x):
    left, right = x
    return self.head(self.fc(left).tanh() + right)


def to_a_dict(self, x):
    h = self.fc(x).tanh()
    return {"logits": self.head(h), "hidden": h, "pair": (h[:, 0], h[:, 1:])}


def twice(self, x):
    return self.head(torch.tanh(self.fc(torch.tanh(self.fc(x)))))


def tied(self, x):
    return F.linear(self.head(self.fc(x).tanh()), self.fc.weight)


def weighed(self, x):
    return self.head((torch.tanh(x) @ self.w).tanh())


def with_parameter(run, *shape):
    return lambda: Custom(run, w=nn.Parameter(torch.randn(*shape)), head=nn.Linear(3, 3))


def embedding():
    return nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 3))


WORDS = torch.tensor([[0, 1, 1], [4, 2, 0], [3, 3, 3], [1, 0, 2], [2, 4, 4]])
# name: how it is made, the layer, the inputs, the method
OTHERS = {
    "loop of its own": (dense(counting), "fc.weight", VECTORS, "loop"),
    "head after a loop of its own": (dense(counting), "head.weight", VECTORS, "outer product"),
    "of a dict": (dense(of_a_dict), "fc.weight", {"a": VECTORS, "b": random(5, seed=1)}, "outer product"),
    "of a tuple": (dense(of_a_tuple), "head.weight", (VECTORS, random(5, 3, seed=1)), "outer product"),
    "to a dict": (dense(to_a_dict), "fc.weight", VECTORS, "outer product"),
    "to a number": (dense(lambda self, x: self.head(self.fc(x).tanh()).sum(1)), "fc.weight", VECTORS, "outer product"),
    "to a dict, from its head": (dense(to_a_dict), "head.weight", VECTORS, "outer product"),
    "used twice": (dense(twice), "fc.weight", VECTORS, "vmap"),
    "tied": (dense(tied), "fc.weight", VECTORS, "vmap"),
    "a parameter": (with_parameter(weighed, 3, 3), "w", VECTORS, "vmap"),
    "transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2, 2), nn.Tanh(), nn.Conv2d(3, 1, 3)),
        "0.weight",
        random(5, 2, 3, 3),
        "vmap",
    ),
    "voxels": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Conv3d(2, 2, 2), nn.Flatten()),
        "2.weight",
        random(5, 1, 4, 4, 4),
        "vmap",
    ),
    "embedding": (embedding, "0.weight", WORDS, "vmap"),
    "head after an embedding": (embedding, "2.weight", WORDS, "outer product"),
    "sequences": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 2, 3, 2)),
        "3.weight",
        random(5, 2, 7),
        "substitution",
    ),
    "one vector of several axes": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Linear(3, 4), nn.Tanh()),
        "1.weight",
        VECTORS,
        "outer product",
    ),
}
