"""Work that goes on beside the caller's: reading ahead, and a bounded pool of workers that finish things."""

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from stages.foundation.current_device import as_here

T = TypeVar("T")
_END = object()


def read_ahead(items: Iterator[T], ahead: int = 2) -> Iterator[T]:
    """The items in order, made in a thread, at most `ahead` of them before they are asked for; what it raises is raised in its
    turn."""
    made: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()
    room, stop, settle = threading.Semaphore(ahead), threading.Event(), as_here()

    def work() -> None:
        try:
            settle()
            while not stop.is_set():
                if room.acquire(timeout=0.1):
                    item = next(items, _END)
                    made.put((item, None))
                    if item is _END:
                        return
        except BaseException as error:
            made.put((_END, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            room.release()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stop.set()
        thread.join()


def made_ahead(make: Callable[[int], T], first: int, threads: int) -> Iterator[T]:
    """make(first), make(first + 1), … in order and without end; each depends on its number alone, so that as many threads make
    the next ones at the same time."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ocd", initializer=as_here())
    try:
        made = deque(pool.submit(make, number) for number in range(first, first + threads))
        for number in itertools.count(first + threads):
            found = made.popleft().result()
            made.append(pool.submit(make, number))
            yield found
    finally:
        pool.shutdown(cancel_futures=True)


class Workers(Generic[T]):
    """A few threads that each finish one thing at a time; `submit` waits while too many are under way.

    Args:
        count: threads.
        waiting: things that may wait beside those being worked on.
        done: hears each result, in the caller's thread.
    """

    def __init__(self, count: int, waiting: int, done: Callable[[T], None]) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="ocd", initializer=as_here())
        self._most, self._done = count + waiting, done
        self._under_way: list[Future[T]] = []

    def submit(self, work: Callable[[], T]) -> None:
        """Hand over some work.

        Raises:
            the first error of work handed over before.
        """
        while len(self._under_way) >= self._most:
            self._take(self._under_way.pop(0))
        while self._under_way and self._under_way[0].done():
            self._take(self._under_way.pop(0))
        self._under_way.append(self._pool.submit(work))

    def collect_until(self, enough: Callable[[], bool]) -> None:
        """Wait for results, oldest first, until there is enough of something they give back.

        Raises:
            the first error of work handed over before.
        """
        while not enough() and self._under_way:
            self._take(self._under_way.pop(0))

    def _take(self, future: "Future[T]") -> None:
        self._done(future.result())

    def finish(self) -> None:
        """Wait for everything.

        Raises:
            the first error of work handed over.
        """
        while self._under_way:
            self._take(self._under_way.pop(0))

    def __enter__(self) -> "Workers[T]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        # What was handed over is finished whatever else went wrong: it may be hours of work.
        self._pool.shutdown(wait=True)
        if error is None:
            self.finish()
