"""The problems of the benchmarks."""

import functools
import gzip
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stages.tasks.data import ArrayDataset
from stages.tasks.losses import CLASSIFICATION, cross_entropy
from stages.tasks.protocol import Task


class Classification(Task):
    """Cross-entropy over classes, on arrays that a subclass makes."""

    kind = CLASSIFICATION
    samples = int(os.environ.get("OCD_BENCHMARK_SAMPLES", 60_000))

    def loss(self, output, y):
        return cross_entropy(output, y)

    def test(self):
        return ArrayDataset(*(part[:256] for part in self.arrays()))

    def train(self):
        return ArrayDataset(*self.arrays())

    def validation(self):
        return self.test()


class LeNet5(nn.Module):
    """As in the authors' repository."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5), nn.Conv2d(16, 120, 5)
        self.fc1, self.fc2 = nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x):
        x = F.max_pool2d(self.conv1(x).relu(), 2)
        x = F.max_pool2d(self.conv2(x).relu(), 2)
        return self.fc2(self.fc1(self.conv3(x).relu().flatten(1)).relu())


class Mnist(Classification):
    """60,000 digits from OCD_DATA/mnist; without, blurred noise of the same shape, which takes the same time to compute."""

    def model(self):
        return LeNet5()

    @functools.cache  # noqa: B019 (a benchmark has one task, and asks for its data often)
    def arrays(self):
        folder = Path(os.environ.get("OCD_DATA", "")) / "mnist"
        if not folder.is_dir():
            draw = torch.Generator().manual_seed(0)
            noise = torch.randn(self.samples, 1, 28, 28, generator=draw)
            return F.avg_pool2d(noise, 5, 1, 2) * 3, torch.randint(10, (self.samples,), generator=draw)
        read = {
            name: np.frombuffer(gzip.decompress((folder / f"train-{name}-ubyte.gz").read_bytes()), np.uint8, offset=offset)
            for name, offset in (("images-idx3", 16), ("labels-idx1", 8))
        }
        x = (torch.from_numpy(read["images-idx3"].astype(np.float32)) / 255 - 0.1307) / 0.3081
        return x.view(-1, 1, 28, 28)[: self.samples], torch.from_numpy(read["labels-idx1"].astype(np.int64))[: self.samples]


class FewDigits(Mnist):
    """As many of them as a benchmark of inference needs to train on."""

    samples = 4096


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, inner, outer, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)
        self.conv2, self.bn2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = None
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x):
        identity = x if self.shortcut is None else self.shortcut(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class ResNet18(nn.Module):
    """ResNet-18 for 32×32 pictures, of width 16 instead of 64."""

    def __init__(self, width=16, classes=10):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        blocks = zip(widths, widths[1:], (1, 2, 2, 2), strict=False)
        self.layers = nn.Sequential(*(layer for a, b, s in blocks for layer in (Block(a, b, s), Block(b, b, 1))))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8 * width, classes)

    def forward(self, x):
        return self.fc(torch.flatten(self.pool(self.layers(self.relu(self.bn1(self.conv1(x))))), 1))


class Pictures(Classification):
    """Noise of 32×32 pixels in three colours."""

    samples = 4096

    def model(self):
        return ResNet18()

    def arrays(self):
        draw = torch.Generator().manual_seed(0)
        return torch.randn(self.samples, 3, 32, 32, generator=draw), torch.randint(10, (self.samples,), generator=draw)


class Tiny(Classification):
    """Points in four dimensions."""

    samples = 600_000

    def model(self):
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def arrays(self):
        draw = torch.Generator().manual_seed(0)
        return torch.randn(self.samples, 4, generator=draw), torch.randint(3, (self.samples,), generator=draw)


class Product(nn.Module):
    """LeNet5's convolutions, then a weight that belongs to no layer; `branching`: which way a sample goes depends on it."""

    def __init__(self, branching):
        super().__init__()
        self.net, self.branching = LeNet5(), branching
        self.weight = nn.Parameter(torch.randn(84, 120) / 120**0.5)

    def forward(self, x):
        x = F.max_pool2d(self.net.conv1(x).relu(), 2)
        x = F.max_pool2d(self.net.conv2(x).relu(), 2)
        hidden = F.linear(self.net.conv3(x).relu().flatten(1), self.weight)
        if self.branching and float(hidden.detach().abs().mean()) < 0:
            return hidden
        return self.net.fc2(hidden.relu())


class Functional(Mnist):
    """A weight that no module applies."""

    def model(self):
        return Product(branching=False)


class Branching(Mnist):
    """The same where numbers decide the way."""

    def model(self):
        return Product(branching=True)
