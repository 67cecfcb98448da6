"""MNIST with the authors' LeNet5: handwritten digits, 28×28 pixels, ten classes."""

import gzip
from collections.abc import Callable
from typing import Any

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

    def features(self, x: Tensor) -> Tensor:
        """Pictures (B, 1, 28, 28) to what fc1 sees, (B, 120)."""
        x = nn.functional.max_pool2d(self.conv1(x).relu(), 2)
        x = nn.functional.max_pool2d(self.conv2(x).relu(), 2)
        return self.conv3(x).relu().flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, 1, 28, 28) to logits (B, 10)."""
        return self.fc2(self.fc1(self.features(x)).relu())


def trained_classifier(
    seen: Callable[[Tensor], Tensor], train: Any, validation: Any, device: torch.device, epochs: int
) -> Callable[[Tensor], Tensor]:
    """A perceptron with two hidden layers on what `seen` makes of x, as after the epoch of the lowest validation loss."""

    @torch.no_grad()
    def inputs(split: Any) -> tuple[Tensor, Tensor]:
        x, y = split.batch(range(len(split)))
        return torch.cat([seen(part.to(device)) for part in x.split(1024)]), y.to(device)

    (x, y), (x_held, y_held) = inputs(train), inputs(validation)
    mean, deviation = x.mean(0), x.std(0).clamp_min(1e-2)
    width = x.shape[1]
    network = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)).to(device)
    optimizer, best, kept = torch.optim.Adam(network.parameters(), lr=1e-3), float("inf"), {}
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            cross_entropy(network((x[rows] - mean) / deviation), y[rows]).mean().backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(cross_entropy(network((x_held - mean) / deviation), y_held).mean())
        if loss < best:
            best, kept = loss, {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(kept)
    return lambda batch: network((seen(batch) - mean) / deviation)


def read_idx(name: str, header_bytes: int) -> np.ndarray:
    """The bytes of one of the four files after its header."""
    path = fetch(f"mnist/{name}-ubyte.gz", [f"{mirror}{name}-ubyte.gz" for mirror in MIRRORS], SHA256[name])
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header_bytes)


class Mnist(Task):
    """60,000 training and 10,000 test pictures, from OCD_DATA/mnist or downloaded.

    Args:
        classifier_epochs: of the classifiers that stand beside OCD in its evaluation.
    """

    kind = CLASSIFICATION

    def __init__(self, classifier_epochs: int = 10) -> None:
        self.classifier_epochs = classifier_epochs

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

    def extra_rows(
        self, model: nn.Module, train: Any, validation: Any, *, seed: int, device: torch.device
    ) -> dict[str, Callable[[Tensor], Tensor]]:
        """What could be known without any delta: plain classifiers trained on I(x), which OCD's networks see, and on x."""

        def seen(x: Tensor) -> Tensor:
            features = model.features(x)
            hidden = model.fc1(features)
            return torch.cat([features, hidden, model.fc2(hidden.relu())], dim=1)

        def both(x: Tensor) -> Tensor:
            return torch.cat([seen(x), x.flatten(1)], dim=1)

        sources = {"classifier on I(x)": seen, "classifier on I(x) and x": both}
        given = (train, validation, device, self.classifier_epochs)
        return {name: trained_classifier(source, *given) for name, source in sources.items()}

    def _read(self, part: str) -> ArrayDataset:
        pictures = read_idx(f"{part}-images-idx3", 16).reshape(-1, 1, 28, 28)
        x = (torch.from_numpy(pictures.astype(np.float32)) / 255 - 0.1307) / 0.3081
        return ArrayDataset(x, torch.from_numpy(read_idx(f"{part}-labels-idx1", 8).astype(np.int64)))
