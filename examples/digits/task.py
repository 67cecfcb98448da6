"""Scikit-learn's bundled digits: 1,797 pictures of 8×8 pixels, ten classes, no download."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from stages.foundation.seeds import generator
from stages.tasks.data import ArrayDataset
from stages.tasks.losses import CLASSIFICATION, cross_entropy
from stages.tasks.protocol import Task

TEST_SAMPLES = 600


class DigitsNet(nn.Module):
    """Two convolutions and two fully connected layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(16 * 2 * 2, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, 1, 8, 8) to logits (B, 10)."""
        x = nn.functional.max_pool2d(self.conv1(x).relu(), 2)
        x = nn.functional.max_pool2d(self.conv2(x).relu(), 2)
        return self.fc2(self.fc1(x.flatten(1)).relu())


class Digits(Task):
    """1,197 pictures to train on and 600 to test on, drawn once and for all."""

    kind = CLASSIFICATION

    def model(self) -> nn.Module:
        """The small convolutional network."""
        return DigitsNet()

    def train(self) -> ArrayDataset:
        """The training set."""
        return self._part(slice(TEST_SAMPLES, None))

    def test(self) -> ArrayDataset:
        """The test set."""
        return self._part(slice(0, TEST_SAMPLES))

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy."""
        return cross_entropy(output, y)

    def _part(self, rows: slice) -> ArrayDataset:
        data = load_digits()
        order = torch.randperm(len(data.target), generator=generator("digits"))[rows]
        x = torch.from_numpy(data.images).float().unsqueeze(1) / 16
        return ArrayDataset(x[order], torch.from_numpy(data.target).long()[order])
