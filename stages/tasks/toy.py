"""A toy problem that ships with ocd, so that a fresh `ocd.toml` works: three noisy spiral arms in the plane."""

import math

import torch
from torch import Tensor, nn

from stages.foundation.seeds import generator
from stages.tasks.data import ArrayDataset
from stages.tasks.losses import CLASSIFICATION, cross_entropy
from stages.tasks.protocol import Task


class Spirals(Task):
    """Tell from a point's coordinates (2,) on which of three spiral arms it lies.

    Args:
        samples: training samples; half as many are for testing.
        width: hidden width of the base.
    """

    kind = CLASSIFICATION

    def __init__(self, samples: int = 600, width: int = 24) -> None:
        self.samples, self.width = samples, width

    def model(self) -> nn.Module:
        """A perceptron with two hidden layers."""
        return nn.Sequential(
            nn.Linear(2, self.width), nn.ReLU(), nn.Linear(self.width, self.width), nn.ReLU(), nn.Linear(self.width, 3)
        )

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy, (B,)."""
        return cross_entropy(output, y)

    def train(self) -> ArrayDataset:
        """Seeded points."""
        return self._points("train", self.samples)

    def test(self) -> ArrayDataset:
        """Other points of the same arms."""
        return self._points("test", self.samples // 2)

    def _points(self, name: str, count: int) -> ArrayDataset:
        draw = generator("spirals", name)
        y = torch.arange(count) % 3
        radius = torch.rand(count, generator=draw)
        angle = 3.5 * radius + y * (2 * math.pi / 3) + 0.35 * torch.randn(count, generator=draw)
        return ArrayDataset(torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), y)
