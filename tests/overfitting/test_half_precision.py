"""Bases of half and of double precision: the deltas of each of their layers equal those of the plain loop."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stages.overfitting.dense import DenseDescent
from stages.overfitting.descent import LabelledBatch
from stages.overfitting.overfit import overfit
from stages.overfitting.overfitter import Overfitter
from stages.overfitting.recipe import Recipe
from stages.per_sample.layer import find_layer
from stages.per_sample.single_precision import in_single_precision
from stages.per_sample.weights import Loop
from stages.tasks.loader import forward, losses
from stages.tasks.protocol import Task

SAMPLES, RECIPES = 16, {"adam": Recipe("adam", 5e-4, 3), "sgd": Recipe("sgd", 0.05, 3)}


def perceptron(width):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


def convolutional():
    layers = [nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 2))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(6, 16), nn.Linear(16, 2)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)

    def forward(self, x):
        return self.head(self.block(self.fc(x)).mean(1))


# How it is made, the shape of a sample, its layers.
MODELS = {
    "narrow": (lambda: perceptron(8), (6,), ["0.weight", "2.weight", "4.weight"]),
    "wide": (lambda: perceptron(256), (6,), ["0.weight", "2.weight", "4.weight"]),
    "convolutional": (convolutional, (2, 6, 6), ["0.weight", "2.weight", "6.weight"]),
    "transformer": (Transformer, (5, 6), ["fc.weight", "block.linear1.weight", "head.weight"]),
}


class Asked(Task):
    def loss(self, output, y):
        return F.cross_entropy(output, y, reduction="none")


def run(model, x):
    return forward(Asked(), model, x)


@pytest.mark.parametrize("optimizer", RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("kind", "layer"), [(kind, layer) for kind, (_, _, layers) in MODELS.items() for layer in layers])
def test_every_layer_is_overfitted_as_by_the_loop(kind, layer, dtype, optimizer):
    make, shape, _ = MODELS[kind]
    for seed in range(3):
        torch.manual_seed(seed)
        model = make().to(dtype).eval().requires_grad_(False)
        x, y = torch.randn(SAMPLES, *shape), torch.randint(0, 2, (SAMPLES,))
        layer_of, recipe = find_layer(model, layer), RECIPES[optimizer]
        in_single_precision(model, layer_of, lambda model=model, x=x: run(model, x))

        def loss(output, labels):
            return losses(Asked(), output, labels)

        overfitter = Overfitter(model, layer_of, run, loss, recipe, x[:4])
        overfitter.confirm(x[:4], y[:4])
        assert overfitter.name != "loop"
        found = overfitter.overfit(overfitter.first_pass(x), x, y)
        batch, loop = LabelledBatch(x, y, loss), Loop(model, layer_of, run)
        alone = [
            overfit(
                DenseDescent(loop, layer_of.weight(model), batch.alone(row), recipe), found.base_loss[row : row + 1], recipe
            )
            for row in range(SAMPLES)
        ]
        delta, rho = torch.cat([one.delta for one in alone]), torch.cat([one.rho for one in alone])
        # What the rest of the model rounds to 8 or 11 bits, gradients follow; the closed form's sums are in another order.
        assert ((found.delta - delta).flatten(1).norm(dim=1) <= 0.02 * rho).all()
