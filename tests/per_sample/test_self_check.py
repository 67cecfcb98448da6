"""The choice among the methods to give samples weights of their own: what is taken for which layer, and why."""

import copy

import pytest
import torch
import torch.nn.functional as F
from overfitters import EXACT, Custom, Tied, by_copies, forward, frozen, random, twice
from torch import nn
from torch.nn.utils import parametrizations

from stages.per_sample.layer import find_layer
from stages.per_sample.runner import Runner
from stages.per_sample.self_check import choose
from stages.per_sample.weights import Loop, Vmap
from stages.tasks.user_code import user_code


def attention():
    return Custom(lambda self, x: self.part(x, x, x)[0], part=nn.MultiheadAttention(4, 2, batch_first=True))


def rows_first(self, x):
    return self.fc(x.flatten(0, 1)).view(*x.shape[:2], -1).sum(1)


def elsewhere(self, x):
    return F.linear(x, self.fc.weight)


def both_ways(self, x):
    return self.fc(x) + F.linear(x, self.fc.weight).square()


def branching(self, x):
    return self.fc(x) if float(x.sum()) > 0 else -self.fc(x)


def branching_twice(self, x):
    return self.fc(branching(self, x))


def second_axis(self, x):
    return self.fc(x.transpose(0, 1)).tanh().sum(0)


def one(run, outputs=2):
    """Makes a model of one layer."""
    return lambda: Custom(run, fc=nn.Linear(3, outputs))


PARAMETRISED = "it is parametrised, or not the weight of a module such as Linear"
UNKNOWN = "is neither Linear, Conv1d nor Conv2d"
SEVERAL_TIMES = "it is called several times in one forward pass"
ELSEWHERE = "its module is not called; the weight is used from elsewhere"
OTHERWISE = "a self-check on a few samples found substitution to give other results"
# name: model, parameter, shape of a sample, the method, why not substitution
NOT_SUBSTITUTABLE = {
    "tied": (Tied, "enter.weight", (3,), "vmap", "it is tied: enter.weight, leave.weight are one"),
    "called twice": (one(twice, 3), "fc.weight", (3,), "vmap", SEVERAL_TIMES),
    "parametrised": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2))),
        "0.parametrizations.weight.original1",
        (3,),
        "vmap",
        PARAMETRISED,
    ),
    "samples on the second axis": (one(second_axis), "fc.weight", (5, 3), "vmap", "its input has 5 rows for a batch of 2"),
    # As many rows as samples, or a multiple: only the numbers tell.
    "samples on the second axis, square": (one(second_axis), "fc.weight", (2, 3), "vmap", OTHERWISE),
    "samples on the second axis, even": (one(second_axis), "fc.weight", (4, 3), "vmap", OTHERWISE),
    "also used outside its module": (one(both_ways), "fc.weight", (3,), "vmap", OTHERWISE),
    "used outside its module": (one(elsewhere), "fc.weight", (3,), "vmap", ELSEWHERE),
    "transposed convolution": (lambda: nn.ConvTranspose2d(2, 3, 2), "weight", (2, 4, 4), "vmap", f"ConvTranspose2d {UNKNOWN}"),
    "voxels": (lambda: nn.Conv3d(1, 2, 2), "weight", (1, 3, 3, 3), "vmap", f"Conv3d {UNKNOWN}"),
    "packed projection": (attention, "part.in_proj_weight", (5, 4), "vmap", PARAMETRISED),
    "output projection": (attention, "part.out_proj.weight", (5, 4), "vmap", ELSEWHERE),
    # torch has no batching rule for recurrent kernels.
    "recurrent": (
        lambda: Custom(lambda self, x: self.part(x)[0][:, -1], part=nn.LSTM(3, 4, batch_first=True)),
        "part.weight_hh_l0",
        (5, 3),
        "loop",
        PARAMETRISED,
    ),
    "branching on a value": (one(branching_twice, 3), "fc.weight", (3,), "loop", SEVERAL_TIMES),
}


def guarded(model, x):
    """A forward pass as the stages make it: what the user's code raises becomes an error of the task."""
    with user_code("the model's forward pass"):
        return model(x)


@pytest.mark.parametrize("name", NOT_SUBSTITUTABLE)
@pytest.mark.parametrize("run_forward", [forward, guarded])
def test_choice_falls_back_and_says_why(name, run_forward):
    make, parameter, shape, method, reason = NOT_SUBSTITUTABLE[name]
    torch.manual_seed(0)
    model, x = frozen(make()), random(2, *shape)
    run, found = choose(model, find_layer(model, parameter), run_forward, x)
    assert run.name == method
    # What follows in the brackets are torch's words.
    assert found.startswith(f"{reason}; vmap cannot run the model (") if method == "loop" else found == reason


@pytest.mark.parametrize("name", NOT_SUBSTITUTABLE)
@pytest.mark.parametrize("gradient", [True, False])
def test_other_ways_are_right_where_substitution_is_not(name, gradient):
    """With and without gradients torch may take another way through a model."""
    make, parameter, shape, chosen, _ = NOT_SUBSTITUTABLE[name]
    torch.manual_seed(0)
    model, x = frozen(make()), random(4, *shape)
    layer = find_layer(model, parameter)
    weights = layer.weight(model) + 0.3 * random(4, *layer.shape, seed=1)
    parts = []
    for i, weight in enumerate(weights):
        net = copy.deepcopy(model)
        net.get_parameter(parameter).copy_(weight)
        parts.append(net(x[i : i + 1]))
    for method in (Loop, Vmap) if chosen == "vmap" else (Loop,):
        with torch.set_grad_enabled(gradient):
            found = method(model, layer, forward)(x, weights.clone().requires_grad_(gradient))
        torch.testing.assert_close(found.detach(), torch.cat(parts), **EXACT)


SUBSTITUTABLE = {
    "dense": (lambda: nn.Sequential(nn.Linear(3, 2)), "0.weight", (3,)),
    "the model itself": (lambda: nn.Linear(3, 2), "weight", (3,)),
    "tokens": (lambda: nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), "0.weight", (5, 3)),
    "rows in the batch": (one(rows_first), "fc.weight", (4, 3)),
    # Without gradients torch would compute the whole layer in one kernel, and its parts would not be called.
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), "linear1.weight", (5, 4)),
    "sequence": (lambda: nn.Sequential(nn.Conv1d(2, 3, 2)), "0.weight", (2, 5)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()), "0.weight", (2, 5, 5)),
}


@pytest.mark.parametrize("name", SUBSTITUTABLE)
@pytest.mark.parametrize("count", [1, 2])
def test_choice_takes_substitution_where_it_is_right(name, count):
    make, parameter, shape = SUBSTITUTABLE[name]
    model = frozen(make())
    run, reason = choose(model, find_layer(model, parameter), forward, random(count, *shape))
    assert (run.name, reason) == ("substitution", "")


def test_a_layer_called_by_keyword():
    model, x = frozen(Custom(lambda self, x: self.fc(input=x), fc=nn.Linear(3, 2))), random(4, 3)
    run, _ = choose(model, find_layer(model, "fc.weight"), forward, x[:2])
    weights = random(4, 2, 3, seed=1)
    torch.testing.assert_close(run(x, weights), by_copies(model, "fc.weight")(x, weights), **EXACT)


def test_choice_is_not_misled_by_samples_that_tell_nothing():
    """With blank probe samples no gradient reaches the layer, and right and wrong look alike."""
    model = frozen(Custom(both_ways, fc=nn.Linear(3, 2, bias=False)))
    run, _ = choose(model, find_layer(model, "fc.weight"), forward, torch.zeros(2, 3).double())
    x, weights = random(4, 3), random(4, 2, 3, seed=1)
    torch.testing.assert_close(run(x, weights), by_copies(model, "fc.weight")(x, weights), **EXACT)


def test_choice_with_outputs_of_several_forms():
    """A dict of a float and an integer tensor: the integer has no gradient to compare."""

    def run(self, x):
        logits = self.fc(x["a"])
        return {"logits": logits, "class": logits.argmax(1)}

    model = frozen(Custom(run, fc=nn.Linear(3, 2)))
    assert choose(model, find_layer(model, "fc.weight"), forward, {"a": random(2, 3)})[1] == ""


class Doubled(nn.Linear):
    """A Linear with a forward pass of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_with_its_own_forward_is_not_taken_for_its_parent():
    model = frozen(nn.Sequential(Doubled(3, 2)))
    run, reason = choose(model, find_layer(model, "0.weight"), forward, random(2, 3))
    assert (run.name, reason) == ("vmap", f"Doubled {UNKNOWN}")


def test_a_forward_that_is_replaced_already_is_left_alone():
    model = frozen(nn.Sequential(nn.Linear(3, 2)))
    model[0].forward = lambda x: x[:, :2]
    run, reason = choose(model, find_layer(model, "0.weight"), forward, random(2, 3))
    assert run.name != "substitution"
    assert reason.startswith("its module's forward pass is replaced already")
    assert "forward" in vars(model[0])


class Inexact(nn.Module):
    """Its gradients are off by a part in five hundred in float32 and channels last, for batches of one or for larger ones."""

    def __init__(self, alone):
        super().__init__()
        self.alone = alone
        self.convolutions = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)))
        self.head = nn.Linear(8 * 36, 3)

    def forward(self, x):
        found = self.head(self.convolutions(x).flatten(1))
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        if x.dtype == torch.float32 and last and (len(x) == 1) == self.alone:
            off = 2e-3 * found
            found = found + off - off.detach()
        return found


@pytest.mark.parametrize("alone", [True, False])
def test_a_check_that_fails_in_channels_last_says_nothing_of_the_usual_format(alone):
    torch.manual_seed(0)
    model, x = Inexact(alone).eval().requires_grad_(False), torch.randn(4, 8, 6, 6)
    runner = Runner(model, find_layer(model, "convolutions.0.weight"), lambda net, x: net(x), x)
    assert (runner.method.name, runner.reason) == ("substitution", "")
    # Where the batch is exact, the loop is not, and float64 says so; else the usual format is taken.
    assert runner.forward.channels_last == alone


def test_what_differs_in_float64_is_wrong():
    """The loop is not blamed for a model whose samples get a weight of another."""
    model = frozen(Custom(lambda self, x: self.fc(x) + 0.02 * x.roll(1, 0)[:, :2] * self.fc(x), fc=nn.Linear(3, 2))).float()
    method, reason = choose(model, find_layer(model, "fc.weight"), forward, random(3, 3).float())
    assert method.name != "substitution"
    assert reason
