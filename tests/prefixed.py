"""Models with something before the layer, and records of it."""

import collections

import torch
import torch.nn.functional as F
from overfitters import Custom, frozen, random
from torch import nn

from stages.per_sample.layer import find_layer
from stages.per_sample.prefix import Prefix


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


def pairs(self, x):
    """Two halves of each sample go through one encoder as one batch, all first halves before all second ones."""
    both = self.enc(torch.cat([x, x.flip(1)])).tanh()
    z = self.fc(x)
    left, right = both.chunk(2)
    return z * left - right


def numbered(self, x):
    """The places of the samples in the batch, known before the layer and used after it."""
    rows, z = torch.arange(len(x)), self.enc(x).tanh()
    for _ in range(self.calls):
        z = self.fc(z)
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


VECTORS = random(6, 3)
SHORT_FIRST = random(6, 3)
SHORT_FIRST[:, 0] = torch.tensor([0.5, 0.6, 1.2, 0.3, 0.8, 1.0])
# The first sample asks for the most.
LONG_FIRST = SHORT_FIRST[[2, 0, 1, 3, 4, 5]]
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
    "pairs": (pairs, parts, VECTORS, None),
    "numbered": (numbered, lambda: parts(calls=1), VECTORS, None),
    "numbered and called twice": (numbered, lambda: parts(calls=2), VECTORS, None),
    "buffered": (buffered, parts, VECTORS, None),
    "sorted and put back": (sorted_and_put_back, parts, VECTORS, None),
    "trimmed": (trimmed, parts, SHORT_FIRST, None),
    "rounds": (rounds_in_python, parts, LONG_FIRST, None),
    "kept": (kept, lambda: parts(outer=nn.Sequential(Keeping(), nn.Tanh())), VECTORS, None),
    "time first": (time_first, lambda: parts(rnn=nn.GRU(3, 3)), random(6, 4, 3), True),
}


def make(name):
    run, build, x, reused = MODELS[name]
    torch.manual_seed(1)
    return frozen(Custom(run, **build())), x, reused


def record_of(model, x):
    return Prefix.probe(model, find_layer(model, "fc.weight"), model, x[:2]).record(lambda: model(x))[1]
