"""What is trained, and the processes that take the same steps as the one that drives the training."""

import math
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from stages.foundation.interruption import deferred
from stages.foundation.tensors import load_tensors


class Trainable(Protocol):
    """What is driven: one step at a time, with its whole state as tensors."""

    step: int

    def advance(self) -> float:
        """Take one step and return its loss."""

    def state(self) -> dict[str, Tensor]:
        """Everything needed to continue."""

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Continue from a state."""


class Leading(Protocol):
    """The processes that follow this one through the training."""

    def agree(self, value: Any) -> Any:
        """Tell them a value."""

    def agree_to_stop(self, stop: bool) -> bool:
        """Tell them, before each step, whether there is one more."""


class Alone:
    """Nobody follows."""

    def agree(self, value: Any) -> Any:
        """The value."""
        return value

    def agree_to_stop(self, stop: bool) -> bool:
        """The value."""
        return stop


def follow(trainer: Trainable, leading: Leading) -> None:
    """Take the same steps as the process that drives the training, from where it begins to where it ends."""
    # Whoever is asked to stop waits for the one that drives: it has been asked, too, and has a checkpoint to write.
    with deferred():
        if begin := leading.agree(None):
            trainer.restore(load_tensors(Path(begin["path"])), begin["step"])
        while not leading.agree_to_stop(False):
            if not math.isfinite(trainer.advance()):
                return
