"""Requests to stop, held until a safe point."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

# What clusters send some time before they kill (SIGUSR1; SIGXCPU, once a second), and a terminal when it goes away (SIGHUP);
# of these every system has its own choice.
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP", "SIGXCPU")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Until the block ends, a request to stop is only noted, and the yielded function says whether there was one. Whoever types
    Ctrl-C twice does not want to wait: the second is an interruption at once. Schedulers send several signals, and do want to.

    Outside the main thread, where Python hears of no signals, nothing changes.
    """
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if asked.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    # None: installed by other than Python, and not ours to put back.
    before = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) is not None}
    try:
        for number, handler in before.items():
            # One that is ignored (as a shell's background job ignores SIGINT) stays so.
            if handler is not signal.SIG_IGN:
                signal.signal(number, note)
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
