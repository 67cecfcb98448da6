"""What the tests of the overfitter share: small models, and the comparison with the loop over copies of the model."""

import copy

import reference
import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from torch import nn

from stages.foundation.trees import leaves, take
from stages.overfitting.dense import DenseDescent
from stages.overfitting.descent import LabelledBatch
from stages.overfitting.overfit import overfit
from stages.overfitting.overfitter import Overfitter
from stages.overfitting.recipe import Recipe
from stages.per_sample.layer import find_layer
from stages.per_sample.self_check import choose

# float64: what differs beyond this is not rounding.
EXACT = {"rtol": 1e-10, "atol": 1e-10}
# The authors' optimizer, one with everything that SGD has, and one that lets samples leave the batch early.
RECIPES = {
    "adam": Recipe("adam", 0.01, 3),
    "sgd": Recipe("sgd", 0.02, 3, momentum=0.9, weight_decay=0.01),
    "until converged": Recipe("sgd", 0.05, momentum=0.5, weight_decay=0.01, until_converged=True, tolerance=0.4, max_steps=12),
}

# Of `make_problem`: model and layer to overfit.
LAYERS = [("dense", "0.weight"), ("dense", "2.weight"), ("convolution", "0.weight"), ("convolution", "2.weight")]


def make_problem(name, dtype, rows=6):
    torch.manual_seed(3)
    if name == "dense":
        model, shape = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), (4,)
    else:
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, (3, 2), 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
        )
        shape = (1, 6, 6)
    model = model.to(dtype).eval().requires_grad_(False)
    return model, torch.randn(rows, *shape, dtype=dtype), torch.arange(rows) % 3


def forward(model, x):
    return model(x)


def frozen(model):
    return model.double().eval().requires_grad_(False)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Custom(nn.Module):
    """Parts by name, and a forward pass of one's own."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 3), nn.Linear(3, 3)
        self.leave.weight = self.enter.weight

    def forward(self, x):
        return self.leave(torch.tanh(self.enter(x)))


def twice(self, x):
    return self.fc(torch.tanh(self.fc(x)))


@st.composite
def convolutions(draw, by_name=False):
    """A kind of convolution, one of it, and the size of a picture that it fits; with padding by name as well if wanted."""
    axes = draw(st.sampled_from([1, 2]))

    def each(low, high):
        return draw(st.tuples(*[st.integers(low, high)] * axes))

    groups, size, kernel, dilation = draw(st.sampled_from([1, 2])), each(3, 7), each(1, 3), each(1, 2)
    named = draw(st.sampled_from(["same", "valid", None])) if by_name else None
    stride, padding = 1 if named == "same" else each(1, 3), named or each(0, 2)
    around = (0,) * axes if named else padding
    if named != "same":
        assume(all(s + 2 * p > d * (k - 1) for s, p, d, k in zip(size, around, dilation, kernel, strict=True)))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    kind = (nn.Conv1d, nn.Conv2d)[axes - 1]
    inputs, outputs = (groups * draw(st.integers(1, 2)) for _ in range(2))
    # Reflection reaches less than the whole picture; the widest border is that of a span of 5.
    return kind, kind(inputs, outputs, kernel, **options), size


def by_copies(model, name):
    """The oracle of the methods to run a model: a copy of the model for each weight, with the weight put in."""

    def run(x, weights):
        size, parts = len(x) // len(weights), []
        for i, weight in enumerate(weights):
            net = copy.deepcopy(model)
            owner = net.get_submodule(name.rpartition(".")[0])
            delattr(owner, name.rpartition(".")[2])
            setattr(owner, name.rpartition(".")[2], weight)
            parts.append(net(x[i * size : (i + 1) * size]))
        return torch.cat(parts)

    return run


def squares(output, y):
    """A loss for outputs of every form, in which no two entries of a sample are alike."""
    total = 0
    for leaf in leaves(output).values():
        flat = leaf.reshape(len(leaf), -1)
        total = total + (flat - torch.linspace(-1, 1, flat.shape[1], dtype=flat.dtype) - y.view(-1, 1)).square().mean(1)
    return total


def cross_entropy(output, y):
    return F.cross_entropy(output, y, reduction="none")


def wanted_of(model, name, x, y, recipe, loss=squares):
    """What the loop over copies of the model gives."""
    named = {key: getattr(recipe, key) for key in ("momentum", "weight_decay", "until_converged", "tolerance", "max_steps")}
    return reference.overfit_loop(model, name, loss, x, y, recipe.optimizer, recipe.lr, recipe.steps, **named)


def assert_same(found, wanted):
    """All that overfitting gives, in double precision."""
    delta = found.delta
    if isinstance(delta, tuple):
        delta = delta[0].unsqueeze(2) * delta[1].unsqueeze(1)
    pairs = {
        "steps": (found.steps.long(), wanted.steps),
        "base_loss": (found.base_loss, wanted.base_loss),
        "delta": (delta, wanted.delta),
        "rho": (found.rho, wanted.rho),
        "overfit_loss": (found.overfit_loss, wanted.overfit_loss),
        "degenerate": (found.degenerate, wanted.largest_gradient < 1e-6),
    }
    for name, (got, want) in pairs.items():
        torch.testing.assert_close(got, want, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


def assert_near(found, wanted):
    """Deltas and their lengths to a thousandth, in single precision."""
    # Where the loss is smaller, Adam normalises rounding noise, and no two correct programs agree.
    assert (wanted.base_loss > 1e-3).all()
    assert found.delta.dtype == torch.float32
    assert ((found.delta - wanted.delta).flatten(1).norm(dim=1) <= 1e-3 * wanted.rho).all()
    torch.testing.assert_close(found.rho, wanted.rho, rtol=1e-3, atol=0)


def overfitter_of(model, name, x, recipe, loss=squares, **options):
    """The overfitter of a layer, for inputs whose first two are its probe."""
    return Overfitter(model, find_layer(model, name), forward, loss, recipe, take(x, slice(0, 2)), **options)


def overfitted(overfitter, x, y, *views):
    return overfitter.overfit(overfitter.first_pass(x), x, y, *views)


def equal_to_the_loop(model, name, x, recipe=RECIPES["sgd"], loss=squares, y=None, factored=False, confirm=False):
    """The overfitter for a layer, once its results for every sample of a batch are found equal to the loop's.

    With `confirm` it first compares itself with the loop on that batch, as the collect stage has it do on some rows. It has its
    probe, and the batch, as copies of its own: some models work in place on what they are given.
    """
    count = len(next(iter(leaves(x).values())))
    y = random(count, seed=5) / 10 if y is None else y
    wanted = wanted_of(model, name, x, y, recipe, loss)
    overfitter = overfitter_of(model, name, copied(x), recipe, loss, factored=factored)
    if confirm:
        overfitter.confirm(copied(x), y)
    batch = copied(x)
    assert_same(overfitter.overfit(overfitter.first_pass(batch), batch, y), wanted)
    return overfitter


def way_equal_to_the_loop(model, name, x, recipe=RECIPES["sgd"], loss=squares):
    """The name of the method chosen for a layer, once its results are found equal to the loop's; for layers that the overfitter
    cannot condition on."""
    y = random(len(x), seed=5) / 10
    wanted = wanted_of(model, name, x, y, recipe, loss)
    layer = find_layer(model, name)
    method, _ = choose(model, layer, forward, x[:2].clone())
    descent = DenseDescent(method, layer.weight(model), LabelledBatch(x, y, loss), recipe)
    assert_same(overfit(descent, loss(model(x), y), recipe), wanted)
    return method.name


def copied(tree):
    """A tree of copies of its tensors."""
    return take(tree, torch.arange(len(next(iter(leaves(tree).values())))))
