"""Deltas of one weight, as matrices or as outer products with a vector that all deltas of a sample share."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Deltas:
    """Deltas of B samples, E of each, or one of each without the axis E.

    Attributes:
        values: the deltas, (B, E, out, in), or, where `inputs` are given, vectors v of deltas v wᵀ, (B, E, out).
        inputs: w, (B, in): what the layer sees, h, or of length 1, h/‖h‖.
    """

    values: Tensor
    inputs: Tensor | None = None

    @classmethod
    def of(cls, deltas: "Deltas | Tensor") -> "Deltas":
        """Deltas of matrices (B, E, out, in), or those given as they are."""
        return deltas if isinstance(deltas, Deltas) else cls(deltas)

    def member(self, which: int | slice) -> "Deltas":
        """One or some of each sample's deltas."""
        return Deltas(self.values[:, which], self.inputs)

    def mean(self) -> "Deltas":
        """The mean of each sample's deltas, as a lone member."""
        return Deltas(self.values.mean(1, keepdim=True), self.inputs)

    def of_samples(self, rows: Tensor) -> "Deltas":
        """Those of some samples."""
        return Deltas(self.values[rows], None if self.inputs is None else self.inputs[rows])

    def scaled(self, factors: Tensor) -> "Deltas":
        """Each sample's deltas times a factor of its own, (B,)."""
        return Deltas(self.values * factors.view(-1, *[1] * (self.values.dim() - 1)), self.inputs)

    def matrices(self) -> Tensor:
        """(B, E, out, in)."""
        if self.inputs is None:
            return self.values
        members = self.inputs if self.values.dim() == 2 else self.inputs.unsqueeze(1)
        return self.values.unsqueeze(-1) * members.unsqueeze(-2)

    def shift(self, seen: Tensor) -> Tensor:
        """What a Linear's output changes by with outer products, one a sample: (seen · w) v.

        `seen` is (B·R, …, in), with R rows of each sample, to (B·R, …, out).
        """
        rows = seen.reshape(len(self.values), -1, seen.shape[-1])
        along = torch.einsum("bri,bi->br", rows, self.inputs.to(seen))
        shift = along.unsqueeze(2) * self.values.to(seen).unsqueeze(1)
        return shift.reshape(*seen.shape[:-1], self.values.shape[-1])
