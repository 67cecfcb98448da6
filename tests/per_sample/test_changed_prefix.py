"""What comes before the layer, where a pass is not as it was recorded: computed anew, or an error, and never other results."""

import pytest
import torch
import torch.nn.functional as F
from overfitters import EXACT, RECIPES, Custom, assert_same, equal_to_the_loop, frozen, overfitter_of, random, wanted_of
from prefixed import VECTORS, parts, record_of
from torch import nn

from stages.per_sample.prefix import PrefixChanged, Record


def noisy(self, x):
    h = self.enc(x)
    return self.fc(h + 0.1 * torch.randn(h.shape, dtype=h.dtype))


def counting(self, x):
    self.count += 1
    return self.fc(self.enc(x) + 0.1 * self.count)


@pytest.mark.parametrize("run", [noisy, counting])
def test_a_prefix_that_differs_from_pass_to_pass_is_not_reused(run):
    model = frozen(Custom(run, **parts(count=0)))
    assert overfitter_of(model, "fc.weight", VECTORS, RECIPES["sgd"]).prefix is None


def other_module(self, x):
    return self.fc(self.head(x) if self.turned else self.enc(x))


def other_function(self, x):
    h = self.enc(x)
    return self.fc(h.sin() if self.turned else h.cos())


def another_function(self, x):
    h = self.enc(x).tanh()
    return self.fc(h * 2 if self.turned else h)


def less(self, x):
    h = self.enc(x)
    return self.fc(h if self.turned else h.tanh())


def nothing(self, x):
    return x if self.turned else self.fc(self.enc(x))


def straight_to_the_layer(self, x):
    return self.fc(x) if self.turned else self.fc(self.enc(x).tanh())


def the_layer_first(self, x):
    if self.turned:
        z = self.fc(x)
        return z + self.enc(x)
    h = self.enc(x)
    return self.fc(x) + h


def fewer_calls(self, x):
    h = self.enc(x)
    return self.fc(h if self.turned else self.enc(h))


@pytest.mark.parametrize("run", [other_module, nothing, straight_to_the_layer, the_layer_first, fewer_calls])
def test_a_pass_that_deviates_is_an_error(run):
    model = frozen(Custom(run, **parts(turned=False)))
    record = record_of(model, VECTORS)
    model.turned = True
    with pytest.raises(PrefixChanged), record.replaying():
        model(VECTORS)
    model.turned = False
    assert "forward" not in vars(model.enc), "the model is left as it was"
    wanted = model(VECTORS)
    with record.replaying():
        assert torch.equal(model(VECTORS), wanted)


def in_place_after(self, x):
    h = self.enc(x)
    z = self.fc(x)
    return h.add_(z) if self.turned else h + 2 * z


def more_calls(self, x):
    h = self.enc(x)
    return self.fc(self.enc(h) if self.turned else h)


@pytest.mark.parametrize("run", [other_function, another_function, less, in_place_after, more_calls])
def test_what_is_not_recorded_is_computed(run):
    """Functions between submodules, calls that come after the last recorded one, and work in place on what was recorded."""
    model = frozen(Custom(run, **parts(turned=False)))
    record = record_of(model, VECTORS)
    model.turned = True
    wanted = model(VECTORS)
    for _ in range(2):
        with record.replaying():
            torch.testing.assert_close(model(VECTORS), wanted, **EXACT)


def chain(self, x):
    """Nobody but a replayed module sees what comes of the first one's output, unless it is turned."""
    h = self.enc(x)
    z = self.fc(self.head(F.max_pool1d(h.unsqueeze(1), 1).flatten(1)).tanh())
    return z + h if self.turned else z


def test_an_output_that_nobody_reads_is_not_kept():
    torch.manual_seed(2)
    model = frozen(Custom(chain, **parts(turned=False)))
    early = F.max_pool1d(model.enc(VECTORS).unsqueeze(1), 1).flatten(1)
    (kept,) = overfitter_of(model, "fc.weight", VECTORS, RECIPES["sgd"]).first_pass(VECTORS).record.tensors
    assert torch.equal(kept, model.head(early))
    equal_to_the_loop(model, "fc.weight", VECTORS)


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_output_that_is_read_after_all(recipe):
    """By another batch than the probe."""
    torch.manual_seed(2)
    model, y = frozen(Custom(chain, **parts(turned=False))), random(6, seed=5)
    overfitter = overfitter_of(model, "fc.weight", VECTORS, RECIPES[recipe])
    model.turned = True
    first = overfitter.first_pass(VECTORS)
    with pytest.raises(PrefixChanged, match="read now"), first.record.replaying():
        model(VECTORS)
    wanted = wanted_of(model, "fc.weight", VECTORS, y, RECIPES[recipe])
    assert_same(overfitter.overfit(first, VECTORS, y), wanted)


READINGS = {
    "together": lambda spent: torch.ones(3, 2) + spent,
    "into another": lambda spent: torch.ones(3, 2).mul_(spent),
    "as an index": lambda spent: torch.ones(3, 2)[spent.long()],
    "side by side": lambda spent: torch.cat([torch.ones(3, 2), spent]),
    "its shape": lambda spent: spent.tanh().shape,
    "a value": lambda spent: bool(spent.sum() > 0),
    "its length": len,
    "as an array": lambda spent: spent.numpy(),
}


@pytest.mark.parametrize("read", READINGS)
def test_reading_what_is_not_kept_is_an_error(read):
    model = nn.Linear(2, 2)
    record = Record([(model, random(3, 2))], [], False).without({model})
    with record.replaying():
        spent = model(torch.ones(3, 2)).tanh()
        with pytest.raises(PrefixChanged, match="read now"):
            READINGS[read](spent)
