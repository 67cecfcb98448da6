"""What comes before the layer: computed once, replayed as it was, and never where that would give other results."""

import collections

import pytest
import torch
import torch.nn.functional as F
from overfitters import EXACT, RECIPES, Custom, assert_same, equal_to_the_loop, forward, frozen, random, squares, wanted_of
from torch import nn

from stages.overfitting.overfitter import Overfitter
from stages.per_sample.layer import find_layer
from stages.per_sample.prefix import Prefix, PrefixChanged, Record


def parts(**more):
    return {"enc": nn.Linear(3, 3), "fc": nn.Linear(3, 3), "head": nn.Linear(3, 3)} | more


def glue(self, x):
    """Functions between the modules, and shapes read as numbers."""
    h = F.max_pool2d(self.conv(x), 2)
    batch, channels = h.shape[0], h.size(1)
    h = F.relu(h).reshape(batch, channels, -1).mean(2)
    return self.fc(torch.cat([h, h.new_ones(batch, 3 - channels)], dim=1))


def in_place_before(self, x):
    h = self.enc(x)
    h += 1
    h.relu_()
    h[:, 0] = 0.5
    return self.fc(h).tanh()


def skip_in_place(self, x):
    """The sum takes the place of a tensor that was made before the layer, and that another name stands for."""
    skip = self.enc(x)
    same = skip.mul_(2)
    z = self.fc(skip.tanh())
    skip += z
    return self.head(same) + skip


def skip_in_place_of_a_view(self, x):
    h = self.enc(x)
    view = h[:, :2]
    z = self.fc(h.tanh())
    h += z
    return torch.cat([h, view], dim=1)


def filled(self, x):
    """A tensor made in the forward pass and filled in part before the layer, in part after it."""
    h = self.enc(x).tanh()
    both = torch.zeros(len(x), 2, 3, dtype=x.dtype)
    both[:, 0] = h
    both[:, 1] = self.fc(h)
    return self.head(both).tanh()


def several_calls(self, x):
    return self.fc(self.enc(self.enc(self.enc(x).tanh()).tanh()))


def called_before_and_after(self, x):
    return self.enc(self.fc(self.enc(x).tanh()).tanh())


def transposed(self, x):
    h = self.enc(x).T.tanh()
    return self.fc((h * 2).mT)


def time_first(self, x):
    """(T, B, H) before the layer."""
    h, _ = self.rnn(x.transpose(0, 1))
    return self.fc(h[-1])


class Several(nn.Module):
    """Gives tensors in a dict and a tuple with a name for each, beside something else."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        h = self.inner(x)
        return {"pair": Pair(h, (h.tanh(), None)), "size": h.shape, "text": "as it is"}


Pair = collections.namedtuple("Pair", ["left", "right"])


def several_outputs(self, x):
    found = self.enc(x)
    pair, text = found["pair"], found["text"]
    assert text == "as it is" and found["size"] == x.shape
    pair.left.mul_(3)
    return self.fc(pair.left + pair.right[0])


def in_place_of_its_input(self, x):
    """A submodule changes what another gave, which is used after the layer."""
    h = self.enc(x)
    return self.fc(self.relu(h)) + h


def shared_with_the_head(self, x):
    return self.head(self.fc(self.enc(x).tanh()).tanh())


def shared():
    found = parts()
    found["head"] = nn.Sequential(found["enc"], nn.Tanh(), found["enc"])
    return found


def nested():
    return nn.Sequential(nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True)), nn.Sequential(nn.Linear(5, 3), nn.Tanh()))


VECTORS = random(6, 3)
# name: forward pass, its parts, the input, whether the prefix is to be reused (None: either is right)
MODELS = {
    "glue": (glue, lambda: parts(conv=nn.Conv2d(1, 2, 3)), random(6, 1, 6, 6), True),
    "in place before": (in_place_before, parts, VECTORS, True),
    "skip in place": (skip_in_place, parts, VECTORS, True),
    "skip in place of a view": (skip_in_place_of_a_view, parts, VECTORS, None),
    "filled": (filled, parts, VECTORS, True),
    "several calls": (several_calls, parts, VECTORS, True),
    "called before and after": (called_before_and_after, parts, VECTORS, True),
    "transposed": (transposed, parts, VECTORS, True),
    "nested": (lambda self, x: self.fc(self.outer(x)), lambda: parts(outer=nested()), VECTORS, True),
    "several outputs": (several_outputs, lambda: parts(enc=Several()), VECTORS, True),
    "in place of its input": (in_place_of_its_input, lambda: parts(relu=nn.ReLU(inplace=True)), VECTORS, None),
    "shared with the head": (shared_with_the_head, shared, VECTORS, True),
    "scripted": (several_calls, lambda: parts(enc=torch.jit.script(nn.Linear(3, 3))), VECTORS, False),
    "time first": (time_first, lambda: parts(rnn=nn.GRU(3, 3)), random(6, 4, 3), True),
}


def make(name):
    run, build, x, reused = MODELS[name]
    torch.manual_seed(1)
    return frozen(Custom(run, **build())), x, reused


def record_of(model, x, name="fc.weight", run=forward):
    prefix = Prefix.probe(model, find_layer(model, name), lambda batch: run(model, batch), x[:2])
    return None if prefix is None else prefix.record(lambda: run(model, x))[1]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_results_are_the_loops(name, recipe):
    model, x, reused = make(name)
    overfitter = equal_to_the_loop(model, "fc.weight", x, RECIPES[recipe])
    assert reused is None or (overfitter.prefix is not None) == reused


def test_a_pass_may_be_replayed_again_and_again():
    """In-place work after the layer must not wear the record out."""
    for name in ("skip in place", "filled", "in place before"):
        model, x, _ = make(name)
        record, wanted = record_of(model, x), model(x)
        for _ in range(3):
            with record.replaying():
                assert torch.equal(model(x), wanted), name


class Counted(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x)


@pytest.mark.parametrize("layer", ["fc.weight", "head.weight"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_prefix_is_computed_once(recipe, layer):
    """By a closed form and by vmap: the early module runs in the first pass alone."""

    def run(self, x):
        h = F.max_pool1d(self.enc(x).unsqueeze(1), 1).squeeze(1)
        return self.fc(self.head(self.head(h).tanh()))

    torch.manual_seed(2)
    model, x, y = frozen(Custom(run, **parts(enc=Counted(nn.Linear(3, 3))))), VECTORS, random(6, seed=5)
    overfitter = Overfitter(model, find_layer(model, layer), forward, squares, RECIPES[recipe], x[:2])
    assert overfitter.name == ("vmap" if layer == "head.weight" else "outer product")
    model.enc.calls = 0
    overfitter.overfit(overfitter.first_pass(x), x, y)
    assert model.enc.calls == 1


def test_nothing_comes_before_the_first_layer():
    torch.manual_seed(2)
    model = frozen(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
    assert Prefix.probe(model, find_layer(model, "0.weight"), model, VECTORS[:2]) is None
    assert equal_to_the_loop(model, "0.weight", VECTORS).prefix is None


def test_hooks_of_the_users_before_the_layer():
    """They act on what they did in the first pass, once, in place or not."""
    torch.manual_seed(3)
    model = frozen(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)))
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[0].register_forward_hook(lambda module, args, output: output.mul_(2))
    model[2].register_forward_hook(lambda module, args, output: output - 0.5)
    for recipe in RECIPES.values():
        assert equal_to_the_loop(model, "4.weight", VECTORS, recipe).prefix is not None


def noisy(self, x):
    h = self.enc(x)
    return self.fc(h + 0.1 * torch.randn(h.shape, dtype=h.dtype))


def counting(self, x):
    self.count += 1
    return self.fc(self.enc(x) + 0.1 * self.count)


@pytest.mark.parametrize("run", [noisy, counting])
def test_a_prefix_that_differs_from_pass_to_pass_is_not_reused(run):
    model = frozen(Custom(run, **parts(count=0)))
    overfitter = Overfitter(model, find_layer(model, "fc.weight"), forward, squares, RECIPES["sgd"], VECTORS[:2])
    assert overfitter.prefix is None


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


def overfitter_of(model, recipe="sgd"):
    return Overfitter(model, find_layer(model, "fc.weight"), forward, squares, RECIPES[recipe], VECTORS[:2])


def test_an_output_that_nobody_reads_is_not_kept():
    torch.manual_seed(2)
    model = frozen(Custom(chain, **parts(turned=False)))
    early = F.max_pool1d(model.enc(VECTORS).unsqueeze(1), 1).flatten(1)
    (kept,) = overfitter_of(model).first_pass(VECTORS).record.tensors
    assert torch.equal(kept, model.head(early))
    equal_to_the_loop(model, "fc.weight", VECTORS)


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_output_that_is_read_after_all(recipe):
    """By another batch than the probe."""
    torch.manual_seed(2)
    model, y = frozen(Custom(chain, **parts(turned=False))), random(6, seed=5)
    overfitter = overfitter_of(model, recipe)
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


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    def run(self, x):
        z = self.fc(self.outer(x).tanh())
        if self.fails:
            raise RuntimeError("after the layer")
        return z

    model = frozen(Custom(run, **parts(outer=nested(), fails=False)))
    record, before = record_of(model, VECTORS), model(VECTORS)
    prefix = Prefix.probe(model, find_layer(model, "fc.weight"), model, VECTORS[:2])
    model.fails = fails
    if fails:
        # Whoever replays goes on without the record, and comes to the error itself.
        with pytest.raises(PrefixChanged, match="after the layer"), record.replaying():
            model(VECTORS)
        with pytest.raises(RuntimeError, match="after the layer"):
            prefix.record(lambda: model(VECTORS))
    else:
        prefix.record(lambda: model(VECTORS))
    model.fails = False
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(VECTORS), before)
