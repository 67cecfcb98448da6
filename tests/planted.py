"""Tasks where it is known beforehand what OCD can do, and projects made of them."""

from conftest import Folder

# The label is a known function of what the layer sees, which the base, having a linear head and one epoch, does not express:
# whoever looks at the layer's input knows the sign of each sample's error.
HELPS = """\
import torch
from torch import nn
from stages.foundation.seeds import generator
from stages.tasks.data import ArrayDataset
from stages.tasks.losses import REGRESSION, mse
from stages.tasks.protocol import Task


class Planted(Task):
    kind = REGRESSION

    def model(self):
        return nn.Sequential(nn.Linear(3, 3, bias=False))

    def points(self, name, count):
        x = torch.randn(count, 3, generator=generator("planted", name))
        return ArrayDataset(x, torch.stack([x[:, 0].sign() * x[:, 1], x[:, 0].abs(), x[:, 2]], dim=1))

    def train(self):
        return self.points("train", 400)

    def validation(self):
        return self.points("validation", 200)

    def test(self):
        return self.points("test", 200)

    def loss(self, output, y):
        return mse(output, y)
"""

# Labels independent of x: nothing about a sample tells its delta.
CANNOT = """\
import torch
from torch import nn
from stages.foundation.seeds import generator
from stages.tasks.data import ArrayDataset
from stages.tasks.losses import CLASSIFICATION, cross_entropy
from stages.tasks.protocol import Task


class Planted(Task):
    kind = CLASSIFICATION

    def model(self):
        return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))

    def points(self, name, count):
        draw = generator("planted", name)
        return ArrayDataset(torch.randn(count, 6, generator=draw), torch.randint(3, (count,), generator=draw))

    def train(self):
        return self.points("train", 300)

    def validation(self):
        return self.points("validation", 200)

    def test(self):
        return self.points("test", 300)

    def loss(self, output, y):
        return cross_entropy(output, y)
"""

FAST = {
    "train-diffusion": {"width": 64, "blocks": 1, "batch_size": 64, "max_steps": 400, "evaluate_steps": 100, "lr": 1e-3},
    "train-scale": {"width": 32, "batch_size": 64, "max_steps": 200},
    "infer": {"ensemble": 5, "sample_steps": 10},
    "select-layer": {"draws": 0},
    "evaluate": {"resamples": 500, "memorisation_samples": 50},
}


def planted(root, source, settings):
    """A project of a planted task."""
    root.mkdir(parents=True)
    (root / "mytask.py").write_text(source)
    folder = Folder(root)
    tables = {"task": {"class": "mytask:Planted", **dict.fromkeys(("model", "loss", "train", "test"))}}
    folder.write({**FAST, **tables, **settings})
    return folder


def helping(root):
    """OCD must help: an under-fitted base whose residual is a known function of the layer's input."""
    settings = {
        "train-base": {"epochs": 1, "lr": 1e-3, "batch_size": 100},
        "select-layer": {"layer": "0.weight", "draws": 0},
        "collect": {"optimizer": "sgd", "lr": 0.3, "steps": 3},
    }
    return planted(root, HELPS, settings)


def hopeless(root):
    """OCD cannot help: labels independent of x, and an over-confident base."""
    settings = {
        "train-base": {"epochs": 60, "lr": 3e-3, "batch_size": 32, "patience": 0},
        "select-layer": {"layer": "2.weight", "draws": 0},
        "collect": {"optimizer": "adam", "lr": 5e-3, "steps": 3},
    }
    return planted(root, CANNOT, settings)
