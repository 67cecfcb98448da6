"""The CPU threads of a stage: torch's own, and those of the libraries beside it."""

import contextlib
from collections.abc import Iterator

import torch
from threadpoolctl import threadpool_limits


def set_threads(count: int) -> None:
    """Compute on so many threads, also in BLAS and OpenMP as numpy, scipy and others have brought them by now."""
    threadpool_limits(count)
    torch.set_num_threads(count)


@contextlib.contextmanager
def threads_restored() -> Iterator[None]:
    """Unfinished work goes on with the threads it was begun with; whatever comes after it has its own again."""
    threads = torch.get_num_threads()
    try:
        # Without a limit, it only remembers.
        with threadpool_limits():
            yield
    finally:
        torch.set_num_threads(threads)
