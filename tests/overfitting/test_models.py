"""Whole models through the overfitter: every sample's result is the loop's, by the method that was to be expected."""

import pytest
import torch
import torch.nn.functional as F
from models import VECTORS, Attending, Residual, dense, lenet, mlp, recurrent
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


def counting(self, x):
    """As many rounds as a sample asks for; those of the others are masked."""
    rounds = (3 * x[:, 0].abs()).long()
    h = x
    for i in range(int(rounds.max()) + 1):
        h = torch.where((i <= rounds).unsqueeze(1), self.fc(h).tanh(), h)
    return self.head(h)


def of_a_dict(self, x):
    return self.head(self.fc(x["a"]).tanh() * x["b"].unsqueeze(1))


def of_a_tuple(self, x):
    left, right = x
    return self.head(self.fc(left).tanh() + right)


def to_a_dict(self, x):
    h = self.fc(x).tanh()
    return {"logits": self.head(h), "hidden": h, "pair": (h[:, 0], h[:, 1:])}


def twice(self, x):
    return self.head(torch.tanh(self.fc(torch.tanh(self.fc(x)))))


def tied(self, x):
    return F.linear(self.head(self.fc(x).tanh()), self.fc.weight)


def weighed(self, x):
    return self.head((torch.tanh(x) @ self.w).tanh())


def with_parameter(run, *shape):
    return lambda: Custom(run, w=nn.Parameter(torch.randn(*shape)), head=nn.Linear(3, 3))


def embedding():
    return nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 3))


WORDS = torch.tensor([[0, 1, 1], [4, 2, 0], [3, 3, 3], [1, 0, 2], [2, 4, 4]])
# name: how it is made, the layer, the inputs, the method
OTHERS = {
    "loop of its own": (dense(counting), "fc.weight", VECTORS, "loop"),
    "head after a loop of its own": (dense(counting), "head.weight", VECTORS, "outer product"),
    "of a dict": (dense(of_a_dict), "fc.weight", {"a": VECTORS, "b": random(5, seed=1)}, "outer product"),
    "of a tuple": (dense(of_a_tuple), "head.weight", (VECTORS, random(5, 3, seed=1)), "outer product"),
    "to a dict": (dense(to_a_dict), "fc.weight", VECTORS, "outer product"),
    "to a number": (dense(lambda self, x: self.head(self.fc(x).tanh()).sum(1)), "fc.weight", VECTORS, "outer product"),
    "to a dict, from its head": (dense(to_a_dict), "head.weight", VECTORS, "outer product"),
    "used twice": (dense(twice), "fc.weight", VECTORS, "vmap"),
    "tied": (dense(tied), "fc.weight", VECTORS, "vmap"),
    "a parameter": (with_parameter(weighed, 3, 3), "w", VECTORS, "vmap"),
    "transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2, 2), nn.Tanh(), nn.Conv2d(3, 1, 3)),
        "0.weight",
        random(5, 2, 3, 3),
        "vmap",
    ),
    "voxels": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Conv3d(2, 2, 2), nn.Flatten()),
        "2.weight",
        random(5, 1, 4, 4, 4),
        "vmap",
    ),
    "embedding": (embedding, "0.weight", WORDS, "vmap"),
    "head after an embedding": (embedding, "2.weight", WORDS, "outer product"),
    "sequences": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 2, 3, 2)),
        "3.weight",
        random(5, 2, 7),
        "substitution",
    ),
    "one vector of several axes": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Linear(3, 4), nn.Tanh()),
        "1.weight",
        VECTORS,
        "outer product",
    ),
}


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


class PredictionBlocks(dict):
    """A dict of the user's own kind, as the transformers library returns."""


def test_a_dict_of_the_users_own_kind():
    model = frozen(Custom(lambda self, x: PredictionBlocks(a=self.fc(self.fc(x).tanh())), fc=nn.Linear(3, 3)))
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
