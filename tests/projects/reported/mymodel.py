"""Models, losses and data after public reports about neighbouring libraries; tests/reported.py says what becomes of each."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

Pair = namedtuple("Pair", ["logits", "hidden"])


@dataclass
class Result:
    logits: torch.Tensor
    hidden: torch.Tensor
    loss: torch.Tensor | None = None


class Output(OrderedDict):
    """Entries that are attributes, too, as a Hugging Face ModelOutput has them."""

    def __init__(self, **values):
        super().__init__({key: value for key, value in values.items() if value is not None})
        self.__dict__.update(values)


class Net(nn.Module):
    """Two layers; what subclasses change is `body`, what lies between them, and `result`."""

    width = 3

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(4, 8), nn.Linear(8, self.width)

    def body(self, h):
        return h.relu()

    def result(self, h):
        return self.head(h)

    def forward(self, x):
        return self.result(self.body(self.fc(x)))


class One(Net):
    width = 1


class Flat(One):
    def result(self, h):
        return self.head(h)[:, 0]


class Squeezed(One):
    def result(self, h):
        return self.head(h).squeeze()


class Normalised(Net):
    def result(self, h):
        return F.normalize(self.head(h), dim=1)


class BFloat(Net):
    def __init__(self):
        super().__init__()
        self.bfloat16()


class BFloatPictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.mid, self.head = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 2)
        self.bfloat16()

    def forward(self, x):
        return self.head(self.mid(self.fc(x).relu()).relu().mean((2, 3)))


class Double(Net):
    def __init__(self):
        super().__init__()
        self.double()


class WithAuxiliary(Net):
    def result(self, h):
        return (self.head(h), self.head(h)) if self.training else self.head(h)


class Checkpointed(Net):
    reentrant = False

    def __init__(self):
        super().__init__()
        self.mid = nn.Linear(8, 8)

    def body(self, h):
        return checkpoint(lambda t: self.mid(t).tanh(), h, use_reentrant=self.reentrant)


class CheckpointedReentrant(Checkpointed):
    reentrant = True


def compiled():
    return torch.compile(Net(), backend="eager")


def compiled_in_place():
    model = Net()
    model.compile(backend="eager")
    return model


def scripted():
    return torch.jit.script(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))


def traced():
    return torch.jit.trace(Net(), torch.zeros(2, 4))


instance = Net()


class AsDict(Net):
    def result(self, h):
        return {"logits": self.head(h)}


class AsPair(Net):
    def result(self, h):
        return Pair(self.head(h), h)


class AsDataclass(Net):
    def result(self, h):
        return Result(self.head(h), h)


class AsOutput(Net):
    def result(self, h):
        return Output(loss=None, logits=self.head(h), hidden_states=(h, h * 2))


class WithClasses(Net):
    def result(self, h):
        logits = self.head(h)
        return {"logits": logits, "pred": logits.argmax(1), "best": logits.max(1)}


class ClassesAlone(Net):
    def result(self, h):
        return self.head(h).argmax(1)


class ExtraState(Net):
    def get_extra_state(self):
        return {"version": 3, "names": ["a", "b"]}

    def set_extra_state(self, state):
        assert state == {"version": 3, "names": ["a", "b"]}


class ObjectState(ExtraState):
    def get_extra_state(self):
        return {"version": object()}


class SparseBuffer(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("adjacency", torch.eye(4).to_sparse())

    def forward(self, x):
        return super().forward(torch.sparse.mm(self.adjacency, x.T).T)


class Lazy(Net):
    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.LazyLinear(8), nn.LazyLinear(3)


class Dropping(Net):
    def body(self, h):
        return F.dropout(h.relu(), 0.2)


class Counting(Net):
    def __init__(self):
        super().__init__()
        self.passes = 0

    def body(self, h):
        self.passes += 1
        return h.relu() * self.passes


class Trimming(Net):
    """Trims to the longest sample of a batch, and divides by what is left."""

    def forward(self, x):
        length = int((x != 0).sum(1).max())
        return self.head(self.fc(x).relu() * x.shape[1] / length)


class QuietTrain(Net):
    def train(self, mode=True):
        super().train(mode)


class Codes(nn.Module):
    max_norm, sparse = None, False

    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(12, 4, max_norm=self.max_norm, sparse=self.sparse), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.emb(x).mean(1))


class MaxNorm(Codes):
    max_norm = 1.0


class SparseGradients(Codes):
    sparse = True


class Tagger(nn.Module):
    """An output for each of 4 tokens, of which trailing zeros are padding: attention's fused kernels leave zeros there."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.fc, self.encoder, self.head = nn.Linear(1, 8), nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(self.fc(x.unsqueeze(2)), src_key_padding_mask=x == 0)).transpose(1, 2)


class TimeFirst(nn.Module):
    """Pictures (B, 2, 6, 6) as sequences of six steps, with time on the first axis."""

    def __init__(self):
        super().__init__()
        self.fc, self.rnn, self.head = nn.Linear(12, 8), nn.GRU(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        steps = x.flatten(2).unflatten(2, (6, 6)).permute(2, 0, 1, 3).flatten(2)
        return self.head(self.rnn(self.fc(steps))[0][-1])


class Experts(Net):
    """Each sample is sent to one of two experts, which see some rows of a batch."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def body(self, h):
        to, found = (h[:, 0] > 0).long(), torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            found[to == number] = expert(h[to == number]).relu()
        return found


class Forces(Net):
    """Its output is the gradient of an energy in the input."""

    def forward(self, x):
        with torch.enable_grad():
            x = x.requires_grad_(True)
            energy = super().forward(x).square().sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0][:, :3]


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h.relu()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no gradient of this")


class BrokenBackward(Net):
    def body(self, h):
        return Straight.apply(h)


class TwoInputs(Net):
    def forward(self, x, more):
        return super().forward(x + more)
