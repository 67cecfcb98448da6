"""Training sets from code, which read files beside it."""

import json
from pathlib import Path

import torch

from stages.tasks.data import load_npz

HERE = Path(__file__).parent


class Rows:
    """The rows of train.npz, of which those that `unreadable.json` names raise and those of `nan.json` are no numbers."""

    def __init__(self):
        self.data = load_npz(HERE / "train.npz", labels=True)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if index in listed("unreadable"):
            raise OSError("the picture is gone")
        x, y = self.data[index]
        return (torch.full_like(x, float("nan")) if index in listed("nan") else x), y


def listed(name):
    path = HERE / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def one():
    return load_npz(HERE / "train.npz", labels=True)


def two():
    return one()


def numbers():
    """A row for each number of a text."""
    return [(torch.full((4,), float(n)), int(n) % 3) for n in (HERE / "rows.txt").read_text().split()]
