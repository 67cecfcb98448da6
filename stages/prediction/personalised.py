"""Personalised prediction: a delta for each input and member, applied to the layer, and the members' combination."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stages.diffusion.generate import DeltaGenerator
from stages.diffusion.sampler import DrawnNoise, Noise
from stages.foundation.deltas import Deltas
from stages.foundation.torch_state import usual_torch
from stages.foundation.trees import Tree, batch_size
from stages.per_sample.capture import LAYER_INPUT
from stages.per_sample.runner import FirstPass, Runner

# x (B, …) and the base's own pass over it -> conditioning {name: (B, …)}
Condition = Callable[[Tree, FirstPass], dict[str, Tensor]]


@dataclass(frozen=True)
class Prediction:
    """What a batch of B inputs gives with E members.

    Attributes:
        output: the members' combination (B, …).
        members: each member's output (E, B, …).
        base_output: the base's output (B, …).
        rho: predicted norm of the delta, (B,), before the strength; None where none was predicted.
        deltas: what was applied, B times E; None where that is not said.
    """

    output: Tree
    members: Tree
    base_output: Tree
    rho: Tensor | None = None
    deltas: Deltas | None = None


class Predictor(Protocol):
    """What predicts for the rows of a split.

    Attributes:
        device: where it computes.
    """

    device: torch.device

    def drawn(self, rows: Sequence[int], members: range) -> DrawnNoise | None:
        """The noise of these rows and members, drawn ahead; None where there is none."""

    def combine(self, outputs: Tree) -> Tree:
        """Members (E, B, …) to their combination (B, …)."""

    def predict(
        self, x: Tree, ensemble: int, *, rows: Sequence[int], first_member: int, noise: DrawnNoise | None
    ) -> Prediction:
        """Predict for inputs (B, …), which are the `rows` of the split, with some of the members."""


class PersonalisedModel:
    """A base with input-dependent weights for one layer: sample deltas, apply them, predict (Alg. 2). Needs no label.

    Args:
        runner: runs the base with a weight for each sample, and what comes before the layer once.
        condition: the conditioning of the base's own pass.
        generate: conditioning to deltas.
        combine: outputs (E, B, …) to (B, …).
        prepare: checks and moves inputs that come from outside.
        ensemble: members unless asked otherwise.
    """

    def __init__(
        self,
        runner: Runner,
        condition: Condition,
        generate: DeltaGenerator,
        combine: Callable[[Tree], Tree],
        prepare: Callable[[Tree], Tree],
        ensemble: int,
    ) -> None:
        self.model, self.layer, self.runner, self.ensemble = runner.model, runner.layer, runner, ensemble
        self._condition, self.generate, self.combine, self._prepare = condition, generate, combine, prepare

    def with_deltas_of(self, generate: DeltaGenerator) -> "PersonalisedModel":
        """The same with another generator."""
        return PersonalisedModel(self.runner, self._condition, generate, self.combine, self._prepare, self.ensemble)

    @property
    def device(self) -> torch.device:
        return self.generate.device

    def drawn(self, rows: Sequence[int], members: range) -> DrawnNoise:
        """The noise of these rows and members, drawn ahead."""
        return self.generate.noise(rows, members).drawn(self.generate.draws)

    @usual_torch()
    def predict(
        self,
        x: Tree,
        ensemble: int | None = None,
        *,
        rows: Sequence[int] | None = None,
        first_member: int = 0,
        noise: Noise | None = None,
    ) -> Prediction:
        """Predict with `ensemble` sampled deltas for each input.

        Args:
            x: inputs (B, …), as the base takes them.
            ensemble: members E; by default the run's setting.
            rows: the numbers that seed each input's noise, by default 0 … B − 1.
            first_member: number of the first member.
            noise: of these rows and members, where it has been drawn before.

        Raises:
            DataError: x differs in shape or dtype from the training set's.
        """
        members = range(first_member, first_member + (ensemble or self.ensemble))
        x = self._prepare(x)
        first = self.runner.first_pass(x)
        conditioning = self._condition(x, first)
        rows = range(batch_size(x)) if rows is None else rows
        deltas, rho = self.generate(conditioning, rows, members, noise, first.captured[LAYER_INPUT])
        outputs = self.runner.members_along(first, x, deltas)(1.0)
        return Prediction(self.combine(outputs), outputs, first.output, rho, deltas)
