"""Outputs along a line of weights, θ + s · delta, and the loop over whole forward passes that they are held against."""

import torch
from overfitters import EXACT, RECIPES, copied, forward, random, squares

from stages.overfitting.overfitter import Overfitter
from stages.per_sample.layer import find_layer
from stages.per_sample.weights import Loop

# Not in order, and one of them twice: what was computed for one strength must not show in the next.
STRENGTHS = (1, 0.0, 0.5, 3.0, -1.0, 0.5)


def along_the_loop(model, name, x, deltas, strength):
    """θ + s · delta put into the model, one sample and one forward pass at a time."""
    layer = find_layer(model, name)
    weights = layer.weight(model) + strength * deltas.reshape(len(deltas), *layer.shape)
    return Loop(model, layer, forward)(copied(x), weights)


def overfitter_of(model, name, x):
    return Overfitter(model, find_layer(model, name), forward, squares, RECIPES["sgd"], copied(x[:2]))


def deltas_of(model, name, count, seed=7):
    return random(count, *find_layer(model, name).matrix_shape, seed=seed)


def equal_along(model, name, x):
    """The overfitter, once its outputs are found equal to the loop's, with what was recorded before the layer and without."""
    overfitter, deltas = overfitter_of(model, name, x), deltas_of(model, name, len(x))
    for recorded in (True, False):
        batch = copied(x)
        first = overfitter.first_pass(batch)
        if not recorded:
            first = type(first)(first.output, first.captured, None)
        at = overfitter.along(first, batch, deltas)
        for strength in STRENGTHS:
            torch.testing.assert_close(at(strength), along_the_loop(model, name, x, deltas, strength), **EXACT)
    return overfitter
