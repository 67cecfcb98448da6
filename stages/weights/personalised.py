"""Personalised prediction: a delta for each input and member, applied to the layer, and the members' combination."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.trees import Tree, batch_size, repeat_samples, tree_map
from stages.weights.layer import Layer
from stages.weights.per_sample import Forward, PerSampleWeights

# conditioning {name: (B, …)}, row numbers (B,), members -> deltas (B, E, out, in) and predicted rho (B,)
SampleDeltas = Callable[[dict[str, Tensor], list[int], range], tuple[Tensor, Tensor]]
Condition = Callable[[Tree], tuple[Tree, dict[str, Tensor]]]


@dataclass(frozen=True)
class Prediction:
    """What a batch of B inputs gives with E members.

    Attributes:
        output: the members' combination (B, …).
        members: each member's output (E, B, …).
        base_output: the base's output (B, …).
        rho: predicted norm of the delta, (B,), before the strength.
        deltas: what was applied, (B, E, out, in).
    """

    output: Tree
    members: Tree
    base_output: Tree
    rho: Tensor
    deltas: Tensor


class PersonalisedModel:
    """A base with input-dependent weights for one layer: sample deltas, apply them, predict (Alg. 2). Needs no label.

    Args:
        model: the base, in eval mode.
        layer: the layer deltas are added to.
        run: the model with a weight per sample.
        forward: the task's forward pass.
        condition: x to the base's output and the conditioning.
        sample_deltas: conditioning to deltas.
        combine: outputs (E, B, …) to (B, …).
        prepare: checks and moves inputs that come from outside.
        ensemble: members unless asked otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: Layer,
        run: PerSampleWeights,
        forward: Forward,
        condition: Condition,
        sample_deltas: SampleDeltas,
        combine: Callable[[Tree], Tree],
        prepare: Callable[[Tree], Tree],
        ensemble: int,
    ) -> None:
        self.model, self.layer, self.ensemble = model, layer, ensemble
        self._run, self._forward, self._condition = run, forward, condition
        self._sample_deltas, self.combine, self._prepare = sample_deltas, combine, prepare

    def predict(
        self, x: Tree, ensemble: int | None = None, *, rows: list[int] | None = None, first_member: int = 0
    ) -> Prediction:
        """Predict with `ensemble` sampled deltas for each input.

        Args:
            x: inputs (B, …), as the base takes them.
            ensemble: members E; by default the run's setting.
            rows: the numbers that seed each input's noise, by default 0 … B − 1.
            first_member: number of the first member.

        Raises:
            DataError: x differs in shape or dtype from the training set's.
        """
        members = range(first_member, first_member + (ensemble or self.ensemble))
        x = self._prepare(x)
        base_output, conditioning = self._condition(x)
        deltas, rho = self._sample_deltas(conditioning, rows if rows is not None else list(range(batch_size(x))), members)
        outputs = apply_deltas(self._run, self.layer, self.model, x, deltas)
        return Prediction(self.combine(outputs), outputs, base_output, rho, deltas)


def apply_deltas(run: PerSampleWeights, layer: Layer, model: nn.Module, x: Tree, deltas: Tensor) -> Tree:
    """Outputs with θ + delta for each input and member, samples × members in one batch.

    Args:
        run: the model with a weight per sample.
        layer: the layer.
        model: the base; gives θ.
        x: inputs (B, …).
        deltas: (B, E, out, in).

    Returns:
        (E, B, …).
    """
    samples, members = deltas.shape[:2]
    weight = layer.weight(model)
    weights = weight + deltas.reshape(samples * members, *layer.shape).to(weight)
    with torch.no_grad():
        outputs = run(repeat_samples(x, members), weights)
    return tree_map(lambda leaf: leaf.reshape(samples, members, *leaf.shape[1:]).transpose(0, 1), outputs)
