"""What the trained networks are built from, and what evaluate has fitted, as types."""

from typing import Literal

from pydantic import Field

from stages.run_directory.format import Record


class EncoderDescription(Record):
    """An encoder of a field: its kind, and the field's shape."""

    kind: str
    shape: list[int]


class NeighboursDescription(Record):
    """How a sample's neighbours are looked up: how many, where they are near, and whether what their deltas cause is told."""

    count: int
    where: Literal["coordinates", "x", "layer_input"]
    effects: bool


class DenoiserDescription(Record):
    """`denoiser.json`: what the denoiser is built from; what its preset has no use for is not there."""

    preset: Literal["mlp", "factored", "vector", "paper", "authors", "small"]
    width: int
    multipliers: list[int] | None = None
    blocks: int
    attention_max_tokens: int | None = None
    dropout: float | None = None
    pad_to: int | None = None
    prediction: Literal["epsilon", "x0", "mean"]
    rank: int | None = None
    shape: list[int]
    fields: dict[str, int]
    schedule: Literal["ddpm", "authors", "paper"]
    encoders: dict[str, EncoderDescription] = Field(default_factory=dict)
    lengthens: bool = False
    neighbours: NeighboursDescription | None = None


class ScaleDescription(Record):
    """`scale.json`: the width of each field, and of the hidden layers."""

    fields: dict[str, int]
    width: int
    encoders: dict[str, EncoderDescription] = Field(default_factory=dict)


class Strength(Record):
    """`strength.json`: the strength that validation samples favour, the loss at each one tried, what it was fitted on; the rows
    that predict, each with its strength, the best of them, and the temperature of the base's logits (or log-probabilities)."""

    strength: float | None
    losses: dict[str, float | None]
    ensemble: int
    samples: int
    rows: dict[str, float | None] = Field(default_factory=dict)
    best: str | None = None
    temperature: float | None = None
    normalised: bool = False
