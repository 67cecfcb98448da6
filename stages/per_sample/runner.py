"""One model run with a weight of its own for each sample, by the fastest method that a self-check finds right; what comes
before the layer is computed once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.foundation.deltas import Deltas
from stages.foundation.trees import Tree, tree_map
from stages.per_sample.capture import capture
from stages.per_sample.layer import Layer
from stages.per_sample.prefix import PrefixChanged, Record
from stages.per_sample.self_check import choose, find_prefix, with_best_format
from stages.per_sample.weights import Forward, Loop, Substitution, Vmap, plain

SPEED = (Substitution, Vmap, Loop)


@dataclass(frozen=True)
class FirstPass:
    """What the base's own pass over a batch gave.

    Attributes:
        output: f_θ(x), (B, …).
        captured: the fields layer_input, activation, base_output and those watched, as the model has them.
        record: what came before the layer, or None.
    """

    output: Tree
    captured: dict[str, Tensor]
    record: Record | None


class Runner:
    """Runs one model with the selected layer's weight replaced for each sample.

    Args:
        model: the base, in eval mode, frozen.
        layer: the selected layer.
        forward: the task's forward pass.
        x: a probe batch, a few samples.
        reuse: record what comes before the layer.
        watched: as `capture`.
    """

    def __init__(
        self, model: nn.Module, layer: Layer, forward: Forward, x: Tree, *, reuse: bool = True, watched: Sequence[str] = ()
    ) -> None:
        self.model, self.layer, self._watched, self._reuse = model, layer, watched, reuse
        self._usual, best = plain(forward), with_best_format(model, forward, x)
        self._run_by(best, x)
        if self.reason and best.channels_last:
            # What a method cannot do in that format it may do in the usual one, faster than the next method does.
            method, prefix, reason = self.method, self.prefix, self.reason
            self._run_by(self._usual, x)
            if SPEED.index(type(self.method)) >= SPEED.index(type(method)):
                self.forward, self.method, self.prefix, self.reason = best, method, prefix, reason

    def _run_by(self, forward: Forward, x: Tree) -> None:
        """Settle how the model is run, by a forward pass in one memory format."""
        self.forward = forward
        self.method, self.reason = choose(self.model, self.layer, forward, x)
        self.prefix = find_prefix(self.method, self.model, self.layer, forward, x) if self._reuse else None

    def first_pass(self, x: Tree) -> FirstPass:
        """Run the base on x (B, …), capture what the layer sees and gives, and record what comes before it."""

        def run() -> tuple[Tree, dict[str, Tensor]]:
            return capture(self.model, self.layer, self.forward, x, self._watched)

        if self.prefix is None:
            (output, captured), record = run(), None
        else:
            (output, captured), record = self.prefix.record(run)
        return FirstPass(output, captured, record)

    def along(self, first: FirstPass, x: Tree, deltas: Deltas | Tensor) -> Callable[[float], Tree]:
        """Outputs with θ + s · delta for each sample, as a function of s; what comes before the layer is not computed again,
        nor, where the layer is substituted, the product with the deltas.

        Args:
            first: the base's own pass over x.
            x: inputs (B, …).
            deltas: one a sample, (B, out, in).

        Returns:
            s to (B, …).
        """
        weight, deltas = self.layer.weight(self.model), Deltas.of(deltas)
        if deltas.inputs is None or not isinstance(self.method, Substitution):
            deltas = Deltas(deltas.matrices().reshape(len(deltas.values), *self.layer.shape).to(weight))

        def line(record: Record | None) -> Callable[[float], Tree]:
            if isinstance(self.method, Substitution):
                return self.method.along(x, deltas, record)
            return lambda strength: self.method(x, weight + strength * deltas.values, record)

        recorded, anew = line(first.record), line(None)

        def at(strength: float) -> Tree:
            with torch.no_grad():
                try:
                    return recorded(strength)
                except PrefixChanged:
                    return anew(strength)

        return at

    def members_along(self, first: FirstPass, x: Tree, deltas: Deltas | Tensor) -> Callable[[float], Tree]:
        """As `along`, for several deltas of each sample: deltas (B, E, out, in), and s to (E, B, …)."""
        deltas = Deltas.of(deltas)
        lines = [self.along(first, x, deltas.member(member)) for member in range(deltas.values.shape[1])]
        return lambda strength: tree_map(lambda *parts: torch.stack(parts), *(line(strength) for line in lines))
