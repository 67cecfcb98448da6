"""When tuning begins, where the settings leave it open."""

from collections.abc import Callable

# A held-out loss on deltas that falls by less than this share within so many evaluations has all but stopped falling: one alone
# may be where a network has not begun to learn.
STILL_FALLING, WITHIN = 0.1, 2


class TuningStart:
    """Watches the held-out loss on deltas, and begins tuning at the first evaluation at which it has all but stopped falling.

    Args:
        tell: told the steps taken when tuning begins.

    Attributes:
        step: steps taken before it; None: it has not begun.
        losses: on deltas, at the last evaluations.
    """

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell = tell
        self.step: int | None = None
        self.losses: list[float] = []

    def look(self, step: int, loss: float) -> None:
        """Hear of an evaluation."""
        if len(self.losses) == WITHIN and loss > (1 - STILL_FALLING) * self.losses[0]:
            self.begin(step)
        self.losses = [*self.losses, loss][-WITHIN:]

    def begin(self, step: int | None) -> None:
        """Tune what follows a step; None: not yet. Where it has begun nothing changes."""
        if step is not None and self.step is None:
            self.step = step
            self._tell(step)
