"""Data sets after public reports: drawn items, tuples of inputs, and what is none."""

import random

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset


class Augmented(torch.utils.data.Dataset):
    """Draws from the generators that numpy and Python share."""

    def __init__(self):
        self.x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)).numpy()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index] + 0.3 * np.random.normal(size=4).astype("float32") + random.random()
        return x, int(self.x[index, 0] > 0)


class Unseeded(Augmented):
    """Draws from a generator of its own that nobody seeds."""

    def __getitem__(self, index):
        return self.x[index] + np.random.default_rng().normal(size=4).astype("float32"), int(self.x[index, 0] > 0)


class Pairs(Augmented):
    """Items whose x is a tuple of two inputs."""

    def __getitem__(self, index):
        return (torch.from_numpy(self.x[index]), torch.ones(4)), int(self.x[index, 0] > 0)


def loader():
    return DataLoader(TensorDataset(torch.randn(60, 4), torch.arange(60) % 3), batch_size=8)
