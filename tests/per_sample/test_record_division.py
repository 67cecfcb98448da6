"""A record of a batch, divided sample by sample for vmap; and what becomes of it when samples leave the batch."""

import pytest
import torch
from overfitters import EXACT, RECIPES, Custom, equal_to_the_loop, frozen, random, wanted_of
from prefixed import VECTORS, make, nested, parts, record_of
from torch import nn

from stages.overfitting.recipe import Recipe

# What each sample has of its own stands in its rows, in the order of the samples.
DIVISIBLE = ["glue", "in place before", "skip in place", "filled", "several calls", "called before and after", "nested"]


@pytest.mark.parametrize("name", DIVISIBLE)
def test_each_samples_part_is_its_own_record(name):
    model, x, _ = make(name)
    found = record_of(model, x).by_sample(len(x))
    for i in range(len(x)):
        wanted = record_of(model, x[i : i + 1]).tensors
        assert len(found) == len(wanted) > 0
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got[i], want, **EXACT)


def test_a_record_that_has_other_rows_than_the_samples_is_not_divided():
    """Also where the first axis happens to be as long as the batch."""
    model, x, _ = make("time first")
    assert record_of(model, x[: x.shape[1]]).by_sample(x.shape[1]) is None


def pairs(self, x):
    """Two halves of each sample go through one encoder as one batch, all first halves before all second ones."""
    both = self.enc(torch.cat([x, x.flip(1)])).tanh()
    z = self.fc(x)
    left, right = both.chunk(2)
    return z * left - right


def numbered(self, x):
    """The places of the samples in the batch, known before the layer and used after it."""
    rows = torch.arange(len(x))
    z = self.fc(self.enc(x).tanh())
    return torch.stack([z[rows, (x[:, 0] > 0).long()], z[rows, 2]], dim=1)


def numbered_and_called_twice(self, x):
    rows = torch.arange(len(x))
    z = self.fc(self.fc(self.enc(x).tanh()))
    return torch.stack([z[rows, (x[:, 0] > 0).long()], z[rows, 2]], dim=1)


def buffered(self, x):
    """A buffer for more samples than there are."""
    buffer = torch.zeros(10, 3, dtype=x.dtype)
    buffer[: len(x)] = self.enc(x).tanh()
    return self.fc(x) * buffer[: len(x)]


def sorted_and_put_back(self, x):
    order = x[:, 0].argsort()
    h = self.enc(x[order]).tanh()
    return self.fc(x).tanh() * h[order.argsort()]


def trimmed(self, x):
    """As many rows as the longest sample of the batch has; a sample's length is its first number."""
    length = (4 * x[:, 0].abs()).long().clamp(1, 6)
    rows = int(length.max())
    steps = x.unsqueeze(1) * torch.arange(1, rows + 1).view(1, -1, 1)
    h = self.enc(steps.flatten(0, 1)).view(len(x), rows, -1)
    h = h * (torch.arange(rows) < length.unsqueeze(1)).unsqueeze(2)
    return self.fc(h.sum(1))


def rounds_in_python(self, x):
    """As many rounds as the sample with the most asks for, counted outside of torch; those of the others are masked."""
    rounds = [int(4 * abs(first)) for first in x[:, 0].tolist()]
    h = x
    for i in range(max(rounds) + 1):
        h = torch.where((torch.tensor(rounds) >= i).unsqueeze(1), self.enc(h).tanh(), h)
    return self.fc(4 * h * x[:, :1])


class Keeping(nn.Module):
    """Keeps what it computed for whoever asks later."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        self.kept = self.fc(x).tanh()
        return 2 * self.kept


def kept(self, x):
    h = self.outer(x)
    return self.fc(h) + self.outer[0].kept


SHORT_FIRST = random(6, 3)
SHORT_FIRST[:, 0] = torch.tensor([0.5, 0.6, 1.2, 0.3, 0.8, 1.0])
# The first sample asks for the most.
LONG_FIRST = SHORT_FIRST[[2, 0, 1, 3, 4, 5]]
# Models for which the numbers of rows alone do not say whose they are: forward pass, its parts, the input
UNCLEAR = {
    "pairs": (pairs, parts, VECTORS),
    "numbered": (numbered, parts, VECTORS),
    "numbered and called twice": (numbered_and_called_twice, parts, VECTORS),
    "buffered": (buffered, parts, VECTORS),
    "sorted and put back": (sorted_and_put_back, parts, VECTORS),
    "trimmed": (trimmed, parts, SHORT_FIRST),
    "rounds in Python": (rounds_in_python, parts, LONG_FIRST),
    "kept": (kept, lambda: parts(outer=nn.Sequential(Keeping(), nn.Tanh())), VECTORS),
}


def make_unclear(name):
    run, build, x = UNCLEAR[name]
    torch.manual_seed(1)
    return frozen(Custom(run, **build())), x


# Samples leave one after another.
EARLY = Recipe("sgd", 0.1, momentum=0.5, until_converged=True, tolerance=0.6, max_steps=15)


@pytest.mark.parametrize("name", UNCLEAR)
def test_results_are_the_loops(name):
    model, x = make_unclear(name)
    equal_to_the_loop(model, "fc.weight", x, RECIPES["adam"])


@pytest.mark.parametrize("name", UNCLEAR)
def test_results_are_the_loops_when_samples_leave(name):
    model, x = make_unclear(name)
    y = random(6, seed=5)
    steps = wanted_of(model, "fc.weight", x, y, EARLY).steps.tolist()
    assert len(set(steps)) > 2, f"samples are to leave at different steps, not {steps}"
    equal_to_the_loop(model, "fc.weight", x, EARLY, y=y)


def test_a_hook_that_keeps_features_for_later():
    """The record of the parent stands for the child, whose hook is then not called."""
    seen = {}
    torch.manual_seed(3)
    model = frozen(Custom(lambda self, x: self.fc(self.outer(x)) + seen["h"], **parts(outer=nested())))
    model.outer[1][0].register_forward_hook(lambda module, args, output: seen.update(h=output))
    equal_to_the_loop(model, "fc.weight", VECTORS, RECIPES["sgd"])
    equal_to_the_loop(model, "fc.weight", VECTORS, EARLY, y=random(6, seed=5))
