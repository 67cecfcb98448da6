"""What the overfitter does not take for granted: hooks, samples that change places, methods that are wrong, work in place."""

import pytest
import torch
from overfitters import RECIPES, Custom, assert_same, equal_to_the_loop, frozen, overfitted, overfitter_of, random, wanted_of
from torch import nn

from stages.foundation.errors import TaskError

HOOKS = {
    "clamped": lambda module, args, output: output.clamp(-0.5, 0.5),
    "cut at zero": lambda module, args, output: output.relu(),
    # Less than the self-check's tolerance.
    "bent a little": lambda module, args, output: output + 3e-4 * output.abs(),
    "twice its input": lambda module, args: (2 * args[0],),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_of_the_users(name, recipe):
    """It stands between the layer's product and what follows, or before it, and must act once."""
    torch.manual_seed(6)
    model = frozen(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh()))
    before = name == "twice its input"
    (model[2].register_forward_pre_hook if before else model[2].register_forward_hook)(HOOKS[name])
    overfitter = equal_to_the_loop(model, "2.weight", random(6, 4), RECIPES[recipe])
    assert not before or overfitter.name == "outer product"


def in_order_of_size(self, x):
    """The samples sorted, as for packed sequences, and put back."""
    order = x[:, 0].argsort()
    return self.head(self.fc(x[order]).tanh()[order.argsort()])


def by_expert(self, x):
    """Each row of a sample (B, rows, in) goes to one of two layers."""
    chosen = x[..., 0] > 0
    out = x.new_zeros(*x.shape[:2], 3)
    out[chosen], out[~chosen] = self.fc(x[chosen]), self.head(x[~chosen])
    return out.tanh()


# Batches whose first two samples, the probe, hide what the others show.
SIZES = [-1.0, 1, 0.5, -0.5, 2, 0]
# Two rows of each probe sample go to the layer; three, and one, of the others: as many on the whole.
ROWS = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1], [1, 1, 1, -1], [1, -1, -1, -1]])
HIDDEN = {
    "in order of size": (in_order_of_size, torch.cat([torch.tensor(SIZES).unsqueeze(1), random(6, 2)], dim=1)),
    "by expert": (by_expert, torch.cat([random(4, 4, 1).abs() * ROWS.unsqueeze(2), random(4, 4, 2, seed=1)], dim=2)),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", HIDDEN)
def test_samples_that_change_places_within_the_model(name, recipe):
    """Two samples cannot show it; in the batch every sample gets its own delta, or it is said that it cannot."""
    run, x = HIDDEN[name]
    torch.manual_seed(7)
    model = frozen(Custom(run, fc=nn.Linear(3, 3), head=nn.Linear(3, 3)))
    try:
        equal_to_the_loop(model, "fc.weight", x, RECIPES[recipe])
    except TaskError as error:
        assert error.message.startswith("samples get into each other's rows")


def trimmed_rows(self, x):
    """As many rows of (B, rows, in) as the longest sample of the batch has; a sample's length is its first number."""
    rows = int(x[:, 0, 0].max())
    shown = (torch.arange(rows) < x[:, :1, 0]).unsqueeze(2)
    return (self.fc(x[:, :rows]).tanh() * shown).sum(1)


@pytest.mark.parametrize("lengths", [[1, 1, 3, 2], [3, 3, 1, 2], [2, 1, 1, 1]], ids=str)
def test_a_probe_that_is_shorter_or_longer_than_the_batch(lengths):
    """One vector a sample in the probe is no promise for the batch."""
    x = random(4, 3, 3)
    x[:, 0, 0] = torch.tensor(lengths)
    torch.manual_seed(7)
    model = frozen(Custom(trimmed_rows, fc=nn.Linear(3, 3)))
    for recipe in RECIPES.values():
        equal_to_the_loop(model, "fc.weight", x, recipe, confirm=True)
        equal_to_the_loop(model, "fc.weight", x.flip(0), recipe, confirm=True)


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_right_is_confirmed(recipe):
    torch.manual_seed(7)
    model = frozen(nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)))
    for name, method in (("0.weight", "substitution"), ("3.weight", "outer product")):
        assert equal_to_the_loop(model, name, random(6, 1, 3), RECIPES[recipe], confirm=True).name == method


def too_large(weights):
    """Each weight taken for a little larger than it is."""
    return 1.1 * weights


def without_gradient(weights):
    """Gradients that are no numbers, though losses are."""
    return weights + (weights - weights.detach()) * float("nan") if weights.requires_grad else weights


class Wrong:
    """A method that takes weights for others."""

    name = "substitution"

    def __init__(self, method, changed):
        self.method, self.changed = method, changed

    def __call__(self, x, weights, record=None):
        return self.method(x, self.changed(weights), record)


@pytest.mark.parametrize("changed", [too_large, without_gradient])
def test_what_is_wrong_is_not_confirmed_and_the_loop_is_taken(changed):
    torch.manual_seed(7)
    model, x, y = frozen(nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Conv1d(2, 2, 2))), random(6, 1, 4), random(6, seed=5)
    overfitter = overfitter_of(model, "2.weight", x, RECIPES["sgd"])
    overfitter.method = Wrong(overfitter.method, changed)
    overfitter.confirm(x, y)
    assert (overfitter.name, overfitter.prefix) == ("loop", None)
    assert overfitter.reason == "a self-check by the task's loss found substitution to give other deltas"
    assert_same(overfitted(overfitter, x, y), wanted_of(model, "2.weight", x, y, RECIPES["sgd"]))


def scaled_in_place(self, x):
    x /= 2
    return self.head(self.fc(x).tanh())


def shifted_in_place(self, x):
    x = x.flatten(1)
    x += 1
    return self.head(self.fc(x).tanh())


@pytest.mark.parametrize("layer", ["fc.weight", "head.weight"])
@pytest.mark.parametrize("run", [scaled_in_place, shifted_in_place])
def test_a_model_that_works_in_place_on_its_input(run, layer):
    """In training each batch is seen once, so nobody notices; here the same one is seen in every step."""
    torch.manual_seed(8)
    equal_to_the_loop(frozen(Custom(run, fc=nn.Linear(3, 4), head=nn.Linear(4, 2))), layer, random(5, 3))


def test_the_users_arrays_are_left_as_they_are():
    torch.manual_seed(8)
    model, x = frozen(Custom(shifted_in_place, fc=nn.Linear(3, 4), head=nn.Linear(4, 2))), random(5, 3)
    before = x.clone()
    overfitter_of(model, "head.weight", x, RECIPES["sgd"])
    assert torch.equal(x, before)
