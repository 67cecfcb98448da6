"""A sample is the same alone as in any batch: losses and models that mix are refused, by every method; their twins are not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from overfitters import random
from reference import overfit_loop
from torch import nn

from stages.foundation.errors import TaskError
from stages.overfitting.dense import DenseDescent
from stages.overfitting.descent import LabelledBatch, own_gradients
from stages.overfitting.overfitter import Overfitter
from stages.overfitting.recipe import Recipe
from stages.per_sample.layer import find_layer
from stages.per_sample.weights import Loop, Substitution, Vmap
from stages.tasks.data import ArrayDataset, Split
from stages.tasks.independence import check_independent, telling_rows
from stages.tasks.protocol import Task

ROWS, CLASSES = 24, 3
X, Y = random(ROWS, 4).float(), torch.arange(ROWS) % CLASSES


def entropy(output, y):
    return F.cross_entropy(output, y, reduction="none")


# From losses (B,) and a weight to losses that know of one another; and the same with a constant in place of the batch's figure.
LOSSES = {
    "mean": (lambda own, w: own + w * own.mean(), lambda own, w: own + w),
    "share of the sum": (lambda own, w: own * w / own.sum(), lambda own, w: own * w / 7),
    "standardised": (lambda own, w: w * (own - own.mean()) / own.std(unbiased=False), lambda own, w: w * (own - 1) / 2),
    "the hardest": (lambda own, w: own * w * (own >= own.median()), lambda own, w: own * w * (own >= 1)),
    "against the next": (lambda own, w: own + w * own.roll(1), lambda own, w: own + w * own),
    "all pairs": (lambda own, w: w * (own[:, None] - own).abs().mean(1), lambda own, w: w * (own - 1).abs()),
}
# The same for a hidden layer (B, H).
MODELS = {
    "mean": (lambda h, w: h + w * h.mean(0), lambda h, w: h + w),
    "normalised": (lambda h, w: h + w * F.normalize(h, dim=0), lambda h, w: h + w * F.normalize(h, dim=1)),
    "attention over the batch": (lambda h, w: h + w * F.softmax(h @ h.T, 1) @ h, lambda h, w: h + w * h),
    "the largest of the batch": (lambda h, w: h + w * h.max(0).values, lambda h, w: h + w * h.max(1, keepdim=True).values),
    "the next": (lambda h, w: h + w * h.roll(1, 0), lambda h, w: h + w * h.roll(1, 1)),
}


class Net(nn.Module):
    def __init__(self, change=lambda h: h):
        super().__init__()
        self.fc, self.head, self._change = nn.Linear(4, 6), nn.Linear(6, CLASSES), change

    def forward(self, x):
        return self.head(self._change(self.fc(x).tanh()))


class Asked(Task):
    def __init__(self, mix):
        self._mix = mix

    def loss(self, output, y):
        return self._mix(entropy(output, y))


def drawn(seed, change=lambda h: h):
    torch.manual_seed(seed)
    return Net(change).eval().requires_grad_(False)


def split_of(x=X, y=Y):
    return Split(ArrayDataset(x, y), name="train")


@pytest.mark.parametrize("kind", LOSSES)
@given(weight=st.floats(0.05, 20), seed=st.integers(0, 1000))
def test_losses_that_mix_are_refused_and_their_twins_are_not(kind, weight, seed):
    mixed, own = LOSSES[kind]
    with pytest.raises(
        TaskError, match=r"the loss looks across the batch: of train\[\d+\] it is .* alone, and .* in a batch of"
    ):
        check_independent(Asked(lambda losses: mixed(losses, weight)), drawn(seed), split_of())
    check_independent(Asked(lambda losses: own(losses, weight)), drawn(seed), split_of())


@pytest.mark.parametrize("kind", MODELS)
@given(weight=st.floats(0.1, 10), seed=st.integers(0, 1000))
def test_models_that_mix_are_refused_and_their_twins_are_not(kind, weight, seed):
    mixed, own = MODELS[kind]
    task = Asked(lambda losses: losses)
    with pytest.raises(TaskError, match=r"the model mixes samples in eval mode: an output of train\[\d+\] is .* alone, and "):
        check_independent(task, drawn(seed, lambda h: mixed(h, weight)), split_of())
    check_independent(task, drawn(seed, lambda h: own(h, weight)), split_of())


@pytest.mark.parametrize("method", [Substitution, Vmap, Loop])
@pytest.mark.parametrize("kind", [kind for kind in LOSSES if kind != "the hardest"])
@given(weight=st.floats(0.05, 20), seed=st.integers(0, 1000))
def test_gradients_that_mix_are_refused_by_every_method(method, kind, weight, seed):
    """Where only the gradients tell: the values are each sample's own."""
    mixed, own = LOSSES[kind]
    model = drawn(seed)
    layer = find_layer(model, "fc.weight")

    def descent(loss):
        run = method(model, layer, lambda net, x: net(x))
        return DenseDescent(run, layer.weight(model), LabelledBatch(X, Y, loss), Recipe("sgd", 0.1))

    def hidden(output, y):
        losses = entropy(output, y)
        known = mixed(losses, weight)
        return losses + known - known.detach()

    with pytest.raises(TaskError, match="samples get into each other's rows"):
        descent(hidden).gradient(0)
    assert torch.isfinite(descent(lambda output, y: own(entropy(output, y), weight)).gradient(0)).all()


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("layer", ["fc.weight", "head.weight"])
def test_the_twins_are_overfitted_as_by_the_loop(kind, layer):
    def loss(output, y):
        return LOSSES[kind][1](entropy(output, y), 0.7)

    model, recipe = drawn(3), Recipe("adam", 0.01, 3)
    overfitter = Overfitter(model, find_layer(model, layer), lambda net, x: net(x), loss, recipe, X[:4])
    overfitter.confirm(X[:4], Y[:4])
    assert overfitter.name == "outer product"
    found = overfitter.overfit(overfitter.first_pass(X), X, Y)
    wanted = overfit_loop(copy.deepcopy(model), layer, loss, X, Y, "adam", 0.01, 3)
    telling = (wanted.largest_gradient > 1e-4).nonzero().flatten()
    torch.testing.assert_close(found.delta[telling], wanted.delta[telling], rtol=1e-3, atol=1e-6)


def scaled(output, share):
    """Outputs of which one column is mixed, as a share of the batch's mean that has no gradient."""
    return output + share * output.mean(0).detach()


# Beside a mixed column of the usual size: columns that are masked, huge, or not a number for one sample alone; tiny outputs.
BESIDE = {
    "masked": lambda h: torch.cat([scaled(h, 0.5), torch.full_like(h, -1e9)], 1),
    "minus infinity": lambda h: torch.cat([scaled(h, 0.5), torch.full_like(h, -torch.inf)], 1),
    "another scale": lambda h: torch.cat([scaled(h, 0.5), 1e5 * h], 1),
    "tiny": lambda h: 1e-5 * scaled(h, 0.5),
    "a spread of one": lambda h: (h - h.mean(0)) / h.std(0),
    "imaginary": lambda h: torch.complex(h, scaled(h, 0.5)),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_mixing_is_not_hidden_by_other_numbers(kind):
    class Beside(Net):
        def forward(self, x):
            return BESIDE[kind](super().forward(x))

    class Own(Task):
        def loss(self, output, y):
            return output.abs().nan_to_num(0, 0, 0)[:, :3].square().mean(1)

    torch.manual_seed(0)
    with pytest.raises(TaskError, match="the model mixes samples in eval mode: an output of"):
        check_independent(Own(), Beside().eval().requires_grad_(False), split_of())


def test_tiny_losses_are_looked_at():
    with pytest.raises(TaskError, match="the loss looks across the batch"):
        check_independent(Asked(lambda losses: 1e-4 * losses * losses / losses.sum()), drawn(0), split_of())


def test_a_random_loss_is_called_random():
    with pytest.raises(TaskError, match="the loss is random"):
        check_independent(Asked(lambda losses: losses * torch.rand(len(losses))), drawn(0), split_of())


def test_small_gradients_of_half_precision_are_healthy():
    """They are rounded as no larger ones are."""
    torch.manual_seed(0)
    weights = torch.randn(8, 32, 4).requires_grad_()
    hidden = torch.bmm(weights, X[:8].unsqueeze(2)).squeeze(2).half().relu()
    output = nn.Linear(32, 512).half()(hidden).float()
    gradient = own_gradients(1e-3 * output.square().mean(1), weights, check=True)
    assert 0 < gradient.abs().max() < 1e-3


def test_a_row_of_rounding_hides_none_that_mixes():
    """The worst row has a backward pass of its own kind, and no gradient of the others'."""
    torch.manual_seed(0)
    weights = torch.randn(8, 5, 4).requires_grad_()
    hidden = list(torch.bmm(weights, X[:8].unsqueeze(2)).squeeze(2).unbind())
    hidden[1].register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    losses = torch.stack([row.square().sum() for row in hidden])
    assert own_gradients(losses, weights, check=True).isfinite().all()
    mixed = losses + 0.05 * torch.eye(8)[3] * losses[4]
    with pytest.raises(TaskError, match="samples get into each other's rows"):
        own_gradients(mixed, weights, check=True)


def test_rows_that_differ_in_length_are_looked_at():
    """Rows are ordered by how many numbers they are filled with: the emptiest and the fullest come first."""
    lengths = torch.full((ROWS,), 3)
    lengths[17], lengths[9] = 1, 4
    x = X * (torch.arange(4) < lengths[:, None])
    assert telling_rows(split_of(x))[:2] == [17, 9]
    assert telling_rows(split_of(x)) == telling_rows(split_of(x))


@pytest.mark.parametrize("rows", [2, 3, 4, 5])
def test_few_rows_are_all_looked_at(rows):
    assert sorted(telling_rows(split_of(X[:rows], Y[:rows]))) == list(range(rows))


def test_what_shows_in_large_batches_alone_is_found_while_collecting(ocd, project):
    folder = project({"task": {"loss": "mymodel:mixing_in_large_batches"}, "collect": {"batch_size": 16}}, code="bad")
    message = ocd(folder, "run", "--until", "collect", "--quiet", code=2).stderr
    assert "the loss looks across the batch: of train[" in message
    assert "in a batch of 16" in message


@pytest.mark.parametrize("rate", [0.3, 0.05])
@given(seed=st.integers(0, 1000))
def test_random_models_are_called_random(rate, seed):
    """However seldom they draw: two passes may agree, and a sample alone differ."""
    task, model = Asked(lambda losses: losses), drawn(seed, lambda h: F.dropout(h, rate))
    try:
        check_independent(task, model, split_of())
    except TaskError as error:
        assert error.message.startswith("the model is random in eval mode")
    else:
        # Nothing was dropped in all these passes.
        assert rate == 0.05
