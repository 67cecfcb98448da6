"""A different weight for each sample: the interface, and the three methods behind it.

`PerSampleWeights` runs the model with the selected layer's weight replaced: G weights serve a batch of G·S samples, weight
g the samples g·S … (g+1)·S − 1. S = 1 is a weight per sample; G = 1 an ordinary forward pass with another weight.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stages.foundation.deltas import Deltas
from stages.foundation.errors import OcdError
from stages.foundation.trees import Tree, as_tree, batch_size, concatenate, leaves, take, tree_map
from stages.per_sample.layer import Layer
from stages.per_sample.plain_torch import plain_torch
from stages.per_sample.prefix import Record
from stages.per_sample.products import Product, product_of

Forward = Callable[[nn.Module, Tree], Tree]
# Numbers that the layer sees of a batch, above which its outputs are not kept from one strength to the next: a product is about
# as fast as reading them, and each member of an ensemble would have its own.
MOST_KEPT = 1 << 22


def plain(forward: Forward, *, channels_last: bool = False) -> Forward:
    """A forward pass in which torch's attention runs module by module: its fused kernels for eval mode do not call the modules
    they stand for, and have no batching rule. The model gets a copy of x, which it may change in place; if `channels_last`,
    pictures (B, C, H, W) in that memory format."""
    if hasattr(forward, "is_plain"):
        return forward

    def copied(leaf: Tensor) -> Tensor:
        return leaf.clone(memory_format=torch.channels_last if channels_last and leaf.dim() == 4 else torch.preserve_format)

    def run(model: nn.Module, x: Tree) -> Tree:
        with plain_torch():
            return forward(model, tree_map(copied, x))

    run.is_plain, run.channels_last = True, channels_last
    return run


class PerSampleWeights(Protocol):
    """A method to run one model with several weights for one layer."""

    name: str

    def __call__(self, x: Tree, weights: Tensor, record: Record | None = None) -> Tree:
        """The outputs (G·S, …) for inputs x (G·S, …) under weights (G, *layer.shape); differentiable in the weights.

        `record` holds what the model computed of x before it came to the layer, which is then not computed again.
        """


class NotSubstitutable(OcdError):
    """The layer cannot be replaced by one with per-sample weights; the message says why.

    An error of the library's own kind, so that it passes through the user's code as it is.
    """


class Bound(nn.Module):
    """A model and the task's own forward pass as one module, so that `functional_call` can replace a parameter under it."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model, self._forward = model, plain(forward)

    def forward(self, x: Tree) -> Tree:
        return self._forward(self.model, x)


@contextmanager
def _attributes_restored(model: nn.Module) -> Iterator[None]:
    """Put back the tensors that modules keep as plain attributes (torch's old weight_norm does): what a pass under another
    weight leaves there is of no use to the next."""

    def kept() -> dict[nn.Module, dict[str, Tensor]]:
        return {m: {name: value for name, value in vars(m).items() if isinstance(value, Tensor)} for m in model.modules()}

    before = kept()
    try:
        yield
    finally:
        for module, found in kept().items():
            for name in found.keys() - before.get(module, {}).keys():
                del vars(module)[name]
            vars(module).update(before.get(module, {}))


class Loop:
    """The plain method: one forward pass for each weight. Works for every parameter of every model."""

    name = "loop"

    def __init__(self, model: nn.Module, layer: Layer, forward: Forward) -> None:
        self._bound = Bound(model, forward)
        self._parameter = f"model.{layer.name}"

    def __call__(self, x: Tree, weights: Tensor, record: Record | None = None) -> Tree:
        """A record is of use only where there is one weight."""
        size = _group_size(x, weights)
        if record is not None and len(weights) == 1:
            with record.replaying():
                return self._one(x, weights[0])
        # Each weight by its number: a model may change a weight in place (max_norm), which no view of all of them allows.
        return concatenate([self._one(take(x, slice(i * size, (i + 1) * size)), weights[i]) for i in range(len(weights))])

    def _one(self, x: Tree, weight: Tensor) -> Tree:
        with _attributes_restored(self._bound):
            return functional_call(self._bound, {self._parameter: weight}, (x,))


class Vmap:
    """The model's forward pass as a function of the parameter, vectorised over the weights by torch.vmap.

    Works wherever the parameter is used, as often as it is used, as long as torch has a batching rule for every operation and
    no Python branch depends on a value.
    """

    name = "vmap"

    def __init__(self, model: nn.Module, layer: Layer, forward: Forward) -> None:
        self._bound = Bound(model, forward)
        self._parameter = f"model.{layer.name}"

    def __call__(self, x: Tree, weights: Tensor, record: Record | None = None) -> Tree:
        """A record is of use only where it can be divided into samples."""
        groups, size = len(weights), _group_size(x, weights)
        grouped = tree_map(lambda leaf: leaf.reshape(groups, size, *leaf.shape[1:]), x)
        parts = record.by_sample(groups) if record is not None and size == 1 else None

        form: list[Tree] = []

        def one(weight: Tensor, inputs: Tree, tensors: list[Tensor]) -> list[Tensor]:
            with nullcontext() if parts is None else record.replaying(tensors):
                form[:] = [functional_call(self._bound, {self._parameter: weight}, (inputs,))]
            # vmap knows tuples, lists and dicts alone.
            return list(leaves(form[0]).values())

        with warnings.catch_warnings(), _attributes_restored(self._bound):
            # It warns of operations that it has to run one sample after another; that costs time, nothing else.
            warnings.filterwarnings("ignore", message=".*performance drop.*")
            outputs = torch.vmap(one)(weights, grouped, parts or [])
        return as_tree(form[0], [leaf.flatten(0, 1) for leaf in outputs])


class Substitution:
    """The fast method, for Linear, Conv1d and Conv2d: only the layer itself computes with per-sample weights, by one batched
    product (for a convolution, a grouped one); the rest of the model runs unchanged on the whole batch.

    Valid because in eval mode the samples of a batch do not interact, so that the gradient of the sum of the losses is each
    sample's own.

    Raises:
        NotSubstitutable: the layer is of another kind, tied or parametrised.
    """

    name = "substitution"

    def __init__(self, model: nn.Module, layer: Layer, forward: Forward) -> None:
        self._model, self._forward = model, plain(forward)
        self.module = layer.module(model)
        self._product = _substitutable(model, layer, self.module)
        self._change = product_of(self.module, bias=False)

    def __call__(self, x: Tree, weights: Tensor, record: Record | None = None) -> Tree:
        """The layer alone computes with the weights.

        Raises:
            NotSubstitutable: the layer is called other than once, or its rows do not divide into samples.
        """
        count = _group_size(x, weights) * len(weights)

        def product(input: Tensor) -> Tensor:
            if input.shape[0] % count:
                raise NotSubstitutable(f"its input has {input.shape[0]} rows for a batch of {count}")
            return self._product(input, weights)

        return self.replaced(x, product, record)

    def along(self, x: Tree, deltas: Deltas | Tensor, record: Record | None = None) -> Callable[[float], Tree]:
        """The outputs with weights θ + s · delta as a function of s: a layer's output is linear in its weight, so that one
        product with the deltas (B, *layer.shape), or outer products of a Linear's, serves every s."""
        kept: list[Tensor] = []
        deltas = Deltas.of(deltas)
        values, as_matrices = deltas.values, deltas.inputs is None

        def at(strength: float) -> Tree:
            def compute(input: Tensor) -> Tensor:
                if not kept:
                    if input.shape[0] % len(values):
                        raise NotSubstitutable(f"its input has {input.shape[0]} rows for a batch of {len(values)}")
                    if as_matrices and input.numel() > MOST_KEPT:
                        return self._product(input, self.module.weight + strength * values)
                    change = self._change(input, values) if as_matrices else deltas.shift(input)
                    kept[:] = type(self.module).forward(self.module, input), change
                return kept[0] + strength * kept[1]

            return self.replaced(x, compute, record)

        return at

    def shifted(self, x: Tree, vectors: Tensor) -> Tree:
        """The outputs where the layer, a Linear that sees one vector h of each of the inputs x, has the delta u (h/‖h‖)ᵀ: its
        output shifts by ‖h‖ u. Differentiable in u, (B, out)."""

        def compute(input: Tensor) -> Tensor:
            along = vectors.to(input).view(len(vectors), *[1] * (input.dim() - 2), -1)
            return type(self.module).forward(self.module, input) + input.norm(dim=-1, keepdim=True) * along

        return self.replaced(x, compute)

    def replaced(self, x: Tree, compute: Callable[[Tensor], Tensor], record: Record | None = None) -> Tree:
        """Run the model on x with `compute` in place of the layer.

        Raises:
            NotSubstitutable: the layer is called other than once.
        """
        calls = 0

        def once(input: Tensor) -> Tensor:  # the name that nn.Linear and nn.Conv2d give it, for calls by keyword
            nonlocal calls
            calls += 1
            if calls > 1:
                raise NotSubstitutable("it is called several times in one forward pass")
            return compute(input)

        with _forward_replaced(self.module, once):
            if record is None:
                output = self._forward(self._model, x)
            else:
                with record.replaying():
                    output = self._forward(self._model, x)
        if calls == 0:
            raise NotSubstitutable("its module is not called; the weight is used from elsewhere")
        return output


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _group_size(x: Tree, weights: Tensor) -> int:
    count = batch_size(x)
    if count % len(weights):
        raise ValueError(f"{len(weights)} weights cannot share {count} samples equally")
    return count // len(weights)


def _substitutable(model: nn.Module, layer: Layer, module: nn.Module) -> Product:
    """The product of module's kind with weights (G, *layer.shape) for inputs (G·S, …)."""
    holders = [name for name, p in model.named_parameters(remove_duplicate=False) if p is module._parameters.get("weight")]
    if layer.name.rpartition(".")[2] != "weight" or "weight" not in module._parameters:
        raise NotSubstitutable("it is parametrised, or not the weight of a module such as Linear")
    if len(holders) > 1:
        raise NotSubstitutable(f"it is tied: {', '.join(holders)} are one")
    if "forward" in vars(module):
        raise NotSubstitutable("its module's forward pass is replaced already")
    product = product_of(module)
    if product is None:
        raise NotSubstitutable(f"{type(module).__name__} is neither Linear, Conv1d nor Conv2d")
    return product
