"""A GPU's memory: what of it is free, work on a few rows at a time, fewer where it runs out, and copies to the host."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from stages.foundation.errors import ComputeError, OcdError
from stages.foundation.trees import Tree, tree_map

T = TypeVar("T")


def free_on_gpu(device: torch.device) -> int:
    """Bytes of a GPU's memory that can be taken, what torch holds for later use included."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def on_its_way(tree: Tree, device: torch.device) -> Callable[[], Tree]:
    """Begin to copy a tree from a device to host memory; what is given back waits for it. A GPU goes on meanwhile, and so does
    the host."""
    if device.type != "cuda":
        here = tree_map(lambda leaf: leaf.cpu(), tree)
        return lambda: here
    # Page-locked: torch makes it so where it need not wait.
    copied, event = tree_map(lambda leaf: leaf.to("cpu", non_blocking=True), tree), torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))

    def arrived() -> Tree:
        event.synchronize()
        return copied

    return arrived


def one_behind(arriving: Iterator[Callable[[], T]], device: torch.device) -> Iterator[T]:
    """What arrives, in order; of a GPU each is waited for when the next one has been begun, so that it need not wait for the
    host."""
    under_way: deque[Callable[[], T]] = deque()
    for one in arriving:
        under_way.append(one)
        if len(under_way) > (device.type == "cuda"):
            yield under_way.popleft()()
    yield from (one() for one in under_way)


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

    def whole(self, work: Callable[[int], T], there_are: int | None = None) -> T:
        """What `work` gives with so many rows at once; from its beginning with half as many (half of those that there are, if
        they are fewer), where memory runs out.

        Raises:
            torch.OutOfMemoryError, OcdError: of the work; it runs out with the least, too.
        """
        while True:
            taken = self.rows if there_are is None else min(self.rows, there_are)
            try:
                return work(taken)
            except (torch.OutOfMemoryError, OcdError) as error:
                if not self._has_half(taken) or not ran_out(error):
                    raise
            # The error is gone, and its frames with what they held.
            torch.cuda.empty_cache()
            self.halve(taken)

    def halve(self, taken: int) -> bool:
        """Take half of what was taken, from now on; False where there is no half."""
        if not self._has_half(taken):
            return False
        self.rows = max(self._least, -(-taken // 2))
        self._tell(self.rows)
        return True

    def _has_half(self, taken: int) -> bool:
        return taken > self._least

    def each(self, rows: range, work: Callable[[range], T]) -> Iterator[T]:
        """What `work` gives for one part of the rows after another."""
        start = rows.start
        while start < rows.stop:
            left = rows.stop - start
            part, found = self.whole(lambda most, start=start: _done(range(start, start + most), work), left)
            yield found
            start = part.stop


def _done(part: range, work: Callable[[range], T]) -> tuple[range, T]:
    return part, work(part)
