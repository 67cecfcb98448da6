"""What comes before the layer: computed once, replayed as it was, and the model left as it was."""

import pytest
import torch
import torch.nn.functional as F
from overfitters import RECIPES, Custom, equal_to_the_loop, frozen, overfitted, overfitter_of, random
from prefixed import MODELS, VECTORS, make, nested, parts, record_of
from torch import nn

from stages.per_sample.layer import find_layer
from stages.per_sample.prefix import Prefix, PrefixChanged


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
    overfitter = overfitter_of(model, layer, x, RECIPES[recipe])
    assert overfitter.name == ("vmap" if layer == "head.weight" else "outer product")
    model.enc.calls = 0
    overfitted(overfitter, x, y)
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
