"""Work on a GPU that is done a few rows at a time, and fewer where its memory runs out."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from stages.foundation.errors import ComputeError, OcdError

T = TypeVar("T")


def ran_out(error: BaseException | None) -> bool:
    """Whether it tells of a GPU's memory that ran out, also where it was raised from such an error."""
    return error is not None and (isinstance(error, torch.OutOfMemoryError) or ran_out(error.__cause__))


@contextlib.contextmanager
def taking_less_memory(hint: str) -> Iterator[None]:
    """Some work for which memory may run out; `hint` is what to type then.

    Raises:
        ComputeError: it ran out.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, ComputeError) as error:
        if not any(isinstance(one, MemoryError) or ran_out(one) for one in (error, error.__cause__)):
            raise
        message = error.message if isinstance(error, ComputeError) else f"out of memory: {error}"
        raise ComputeError(message, hint) from error


class AtOnce:
    """How many rows are taken at once: halved where a GPU's memory runs out, for good. On a CPU it stays as it is.

    Args:
        rows: to begin with.
        least: fewer are never taken.
        tell: hears what is taken from then on.
    """

    def __init__(self, rows: int, least: int = 1, tell: Callable[[int], None] = lambda rows: None) -> None:
        self.rows, self._least, self._tell = max(rows, least), least, tell

    def whole(self, work: Callable[[int], T]) -> T:
        """What `work` gives with so many rows at once; from its beginning with half as many, where memory runs out.

        Raises:
            torch.OutOfMemoryError, OcdError: of the work; it runs out with the least, too.
        """
        while True:
            try:
                return work(self.rows)
            except (torch.OutOfMemoryError, OcdError) as error:
                if self.rows <= self._least or not ran_out(error):
                    raise
            # The error is gone, and its frames with what they held.
            torch.cuda.empty_cache()
            self.rows = max(self._least, -(-self.rows // 2))
            self._tell(self.rows)

    def each(self, rows: range, work: Callable[[range], T]) -> Iterator[T]:
        """What `work` gives for one part of the rows after another."""
        start = rows.start
        while start < rows.stop:
            part, found = self.whole(lambda most, start=start: _done(range(start, min(rows.stop, start + most)), work))
            yield found
            start = part.stop


def _done(part: range, work: Callable[[range], T]) -> tuple[range, T]:
    return part, work(part)
