"""Whole models through the overfitter: every sample's result is the loop's, by the method that was to be expected."""

import pytest
import torch
import torch.nn.functional as F
from models import OTHERS, VECTORS, Attending, Residual, dense, lenet, mlp, recurrent
from overfitters import RECIPES, Custom, cross_entropy, equal_to_the_loop, frozen, random, squares
from torch import nn

CLASSES = torch.arange(5) % 3


# model: how it is made, the shape of a sample
CLASSIFIERS = {
    "mlp": (mlp, (4,)),
    "lenet": (lenet, (1, 8, 8)),
    "residual": (Residual, (1, 5, 5)),
    "attending": (Attending, (1, 4, 4)),
    "lstm": (lambda: recurrent(nn.LSTM), (6, 4)),
    "gru": (lambda: recurrent(nn.GRU), (6, 4)),
}
# model, layer, method, whether a prefix is reused
EXPECTED = [
    ("mlp", "0.weight", "outer product", False),
    ("mlp", "2.weight", "outer product", True),
    ("mlp", "4.weight", "outer product", True),
    ("lenet", "0.weight", "substitution", False),
    ("lenet", "3.weight", "substitution", True),
    ("lenet", "6.weight", "outer product", True),
    ("lenet", "8.weight", "outer product", True),
    ("residual", "stem.0.weight", "substitution", False),
    ("residual", "blocks.0.conv2.weight", "substitution", True),
    ("residual", "blocks.1.conv1.weight", "substitution", True),
    ("residual", "blocks.1.conv2.weight", "substitution", True),
    ("residual", "head.weight", "outer product", True),
    ("attending", "patch.weight", "substitution", False),
    ("attending", "attention.in_proj_weight", "vmap", True),
    ("attending", "mlp.0.weight", "substitution", True),
    ("attending", "mlp.2.weight", "substitution", True),
    ("attending", "head.weight", "outer product", True),
    # torch has no batching rule for recurrent kernels.
    ("lstm", "rnn.weight_hh_l0", "loop", False),
    ("lstm", "rnn.weight_ih_l0", "loop", False),
    ("lstm", "head.weight", "outer product", True),
    ("gru", "rnn.weight_hh_l0", "loop", False),
    ("gru", "head.weight", "outer product", True),
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("model", "name", "method", "reused"), EXPECTED)
def test_classifiers(model, name, method, reused, recipe):
    make, shape = CLASSIFIERS[model]
    torch.manual_seed(1)
    net = frozen(make())
    before = {key: value.clone() for key, value in net.state_dict().items()}
    overfitter = equal_to_the_loop(net, name, random(5, *shape), RECIPES[recipe], cross_entropy, CLASSES)
    assert (overfitter.name, overfitter.prefix is not None) == (method, reused), overfitter.reason or overfitter.why_dense
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", OTHERS)
def test_models_of_other_forms(name, recipe):
    make, layer, x, method = OTHERS[name]
    torch.manual_seed(2)
    overfitter = equal_to_the_loop(frozen(make()), layer, x, RECIPES[recipe])
    assert overfitter.name == method, overfitter.reason or overfitter.why_dense


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("layer", "method"),
    [("0.linear1.weight", "substitution"), ("0.self_attn.in_proj_weight", "vmap"), ("1.weight", "substitution")],
)
def test_torchs_own_transformer(layer, method, recipe):
    """Without gradients torch would compute its encoder layer in one kernel: passes with and without must still agree."""
    torch.manual_seed(3)
    encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=0, batch_first=True)
    model = frozen(nn.Sequential(encoder, nn.Linear(4, 2)))
    before = torch.backends.mha.get_fastpath_enabled()
    assert equal_to_the_loop(model, layer, random(4, 5, 4), RECIPES[recipe]).name == method
    assert torch.backends.mha.get_fastpath_enabled() == before


class Output(dict):
    """A dict of the user's own kind, as the transformers library returns."""


def test_a_dict_of_the_users_own_kind():
    model = frozen(Custom(lambda self, x: Output(a=self.fc(self.fc(x).tanh())), fc=nn.Linear(3, 3)))
    assert equal_to_the_loop(model, "fc.weight", VECTORS).name in ("vmap", "loop")


def test_a_loss_of_one_small_output_among_large_ones():
    """An error in the part that the loss is of must not hide behind a part ten thousand times as large."""

    def run(self, x):
        z = self.fc(x)
        return {"picture": 1e4 * torch.tanh(self.head(x)) + 100 * z, "logits": z + F.linear(x, self.fc.weight)}

    torch.manual_seed(0)
    equal_to_the_loop(
        frozen(dense(run)()), "fc.weight", VECTORS, loss=lambda output, y: squares({"logits": output["logits"]}, y)
    )
