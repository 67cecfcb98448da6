"""How a training is driven, and how it ended."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from stages.run_directory.format import Extent


@dataclass(frozen=True)
class Plan:
    """How a training is driven.

    Attributes:
        evaluate_steps, checkpoint_steps: steps between evaluations, and between checkpoints.
        checkpoint_minutes: time after which there is one in any case.
        patience: evaluations without a better score before stopping; 0: never.
        largest_loss: a loss above it has exploded.
        advice: what to try where the loss is lost.
        patient_until: steps before which patience does not wait yet.
    """

    max_steps: int
    evaluate_steps: int
    checkpoint_steps: int
    patience: int
    checkpoint_minutes: float = math.inf
    largest_loss: float = math.inf
    advice: str = "try a smaller lr with --force"
    patient_until: int = 0

    @classmethod
    def of(cls, table: Any, stage: str, largest_loss: float, lr: float, patient_until: int = 0) -> Self:
        """As the settings of `[train-diffusion]` and `[train-scale]` have it."""
        names = ("max_steps", "evaluate_steps", "checkpoint_steps", "patience", "checkpoint_minutes")
        settings = {name: getattr(table, name) for name in names}
        advice = f"try a smaller learning rate: --set {stage}.lr={lr / 4:g} --force"
        return cls(**settings, largest_loss=largest_loss, advice=advice, patient_until=patient_until)


@dataclass(frozen=True)
class Trained:
    """How a training ended: steps taken, whether patience ended it, the best evaluation and the snapshot made then, and after
    which step tuning began, where the losses decided it."""

    steps: int
    stopped_early: bool
    best: dict[str, Any]
    snapshot: Path
    tuned_from: int | None = None

    def extent(self, asked: int) -> Extent:
        return Extent(value=asked, reached=self.steps, exhausted=self.stopped_early)
