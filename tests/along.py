"""Outputs along a line of weights, θ + s · delta, and the loop over whole forward passes that they are held against."""

import torch
from overfitters import EXACT, RECIPES, copied, forward, overfitter_of, random

from stages.foundation.trees import batch_size
from stages.per_sample.layer import find_layer
from stages.per_sample.weights import Loop

# Not in order, and one of them twice: what was computed for one strength must not show in the next.
STRENGTHS = (1, 0.0, 0.5, 3.0, -1.0, 0.5)


def along_the_loop(model, name, x, deltas, strength):
    """θ + s · delta put into the model, one sample and one forward pass at a time."""
    layer = find_layer(model, name)
    weights = layer.weight(model) + strength * deltas.reshape(len(deltas), *layer.shape)
    return Loop(model, layer, forward)(copied(x), weights)


def deltas_of(model, name, count, seed=7):
    return random(count, *find_layer(model, name).matrix_shape, seed=seed)


def line_of(model, name, x, deltas):
    """The outputs along a line of deltas, as a function of the strength."""
    overfitter = overfitter_of(model, name, copied(x), RECIPES["sgd"])
    return overfitter.along(overfitter.first_pass(x), x, deltas)


def close_to_the_loop(at, model, name, x, deltas):
    """What is found for each strength is what the loop finds."""
    for strength in STRENGTHS:
        torch.testing.assert_close(at(strength), along_the_loop(model, name, x, deltas, strength), **EXACT)


def equal_along(model, name, x):
    """The overfitter, once its outputs are found equal to the loop's, with what was recorded before the layer and without."""
    overfitter, deltas = overfitter_of(model, name, copied(x), RECIPES["sgd"]), deltas_of(model, name, batch_size(x))
    for recorded in (True, False):
        batch = copied(x)
        first = overfitter.first_pass(batch)
        if not recorded:
            first = type(first)(first.output, first.captured, None)
        close_to_the_loop(overfitter.along(first, batch, deltas), model, name, x, deltas)
    return overfitter
