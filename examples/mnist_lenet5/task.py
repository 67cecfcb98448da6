"""MNIST with the authors' LeNet5: handwritten digits, 28×28 pixels, ten classes."""

import gzip

import numpy as np
import torch
from torch import Tensor, nn

from stages.tasks.data import ArrayDataset
from stages.tasks.fetch import fetch
from stages.tasks.losses import CLASSIFICATION, cross_entropy
from stages.tasks.protocol import Task

MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
SHA256 = {
    "train-images-idx3": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}


class LeNet5(nn.Module):
    """LeNet5 as in the authors' repository: convolutions to 6, 16 and 120 channels, fully connected to 84 and 10."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5), nn.Conv2d(16, 120, 5)
        self.fc1, self.fc2 = nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, 1, 28, 28) to logits (B, 10)."""
        x = nn.functional.max_pool2d(self.conv1(x).relu(), 2)
        x = nn.functional.max_pool2d(self.conv2(x).relu(), 2)
        return self.fc2(self.fc1(self.conv3(x).relu().flatten(1)).relu())


def read_idx(name: str, header_bytes: int) -> np.ndarray:
    """The bytes of one of the four files after its header."""
    path = fetch(f"mnist/{name}-ubyte.gz", [f"{mirror}{name}-ubyte.gz" for mirror in MIRRORS], SHA256[name])
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header_bytes)


class Mnist(Task):
    """60,000 training and 10,000 test pictures, from OCD_DATA/mnist or downloaded."""

    kind = CLASSIFICATION

    def model(self) -> nn.Module:
        """LeNet5."""
        return LeNet5()

    def train(self) -> ArrayDataset:
        """The training set."""
        return self._read("train")

    def test(self) -> ArrayDataset:
        """The test set."""
        return self._read("t10k")

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy."""
        return cross_entropy(output, y)

    def _read(self, part: str) -> ArrayDataset:
        pictures = read_idx(f"{part}-images-idx3", 16).reshape(-1, 1, 28, 28)
        x = (torch.from_numpy(pictures.astype(np.float32)) / 255 - 0.1307) / 0.3081
        return ArrayDataset(x, torch.from_numpy(read_idx(f"{part}-labels-idx1", 8).astype(np.int64)))
