"""Commands in processes of their own, disks with little room, and the one place that reaches into the library to stop it.

A kill, an interruption or a full disk at a given point cannot be had through arguments or settings: it is what no user asks
for. So the functions at the end of this module put another function in the place of the library's for a while.
"""

import contextlib
import itertools
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from folders import Folder

from ocd_cli.app import main
from stages.overfitting.collector import Collector
from stages.prediction.predicting import BlockPredictor
from stages.store.delta_store import DeltaStore
from stages.store.predictions import PredictionBlocks
from stages.training.trainer import Trainer

# What a command says that was asked to end.
INTERRUPTED = "error: {} was interrupted; what is finished is kept\n  to continue, run the same command again\n"


class Started:
    """`ocd` in a process of its own, forked from this one: what is imported already need not be imported again.

    Args:
        folder: the project.
        args: the command's words.
        delay: seconds that each pass of the slow project's model takes once the work of collect or infer has begun.
        held_after: blocks after which it is held there until `let_go`; 0 for not at all.
    """

    def __init__(self, folder: Folder, *args: object, delay: float = 0.0, held_after: int = 0) -> None:
        self._folder = folder
        # So that what is computed and what is written keep together.
        delay = delay or 0.02 * (held_after > 0)
        words = [*map(str, args), "--config", str(folder.config), "--device", "cpu"]
        self._texts = [folder.root / f"{time.monotonic_ns()}.{name}" for name in ("stdout", "stderr")]
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._become(words, delay, held_after)

    def _become(self, words: list[str], delay: float, held_after: int) -> None:
        code = 70
        try:
            for number, path in zip((1, 2), self._texts, strict=True):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
            # A shell's background jobs ignore it, and what they start inherits that.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            slow_down(delay, held_after)
            sys.argv = ["ocd", *words]
            try:
                main()
            except SystemExit as end:
                code = end.code or 0
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    @property
    def stdout(self) -> str:
        """What it has printed."""
        return self._texts[0].read_text()

    @property
    def stderr(self) -> str:
        """What it has told."""
        return self._texts[1].read_text()

    def ended(self) -> bool:
        """Whether it has."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self, code: int = 0, timeout: float = 600) -> "Started":
        """Wait for its end; the exit code is asserted (negative: the signal), and no traceback is shown."""
        wait_until(self.ended, timeout)
        shown = f"exit code {self.code}\n{self.stdout}\n{self.stderr}"
        assert self.code == code, shown
        assert "Traceback" not in shown
        return self

    def let_go(self) -> "Started":
        """Let it, and the others of its project, go on."""
        (self._folder.root / "go on").touch()
        return self

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, unless it has ended."""
        if not self.ended():
            os.kill(self.pid, number)

    def die(self) -> None:
        """Kill it, which must not have ended."""
        self.kill()
        self.wait(-signal.SIGKILL)


@dataclass(frozen=True)
class SmallDisk:
    """A file system with little room."""

    path: Path

    def fill(self, free: int = 0) -> Path:
        """A file that takes all room but some; delete it to have the room back."""
        path, left = self.path / "filler", shutil.disk_usage(self.path).free - free
        with path.open("ab") as stream:
            os.posix_fallocate(stream.fileno(), stream.tell(), left)
        return path


def wait_until(ready: Any, timeout: float = 600) -> None:
    """Wait for something to become true; long enough for a busy machine."""
    deadline = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


@contextlib.contextmanager
def before(where: Any, name: str, first: Callable[..., object]) -> Any:
    """Let something happen before each call of a function of the library; `first` gets the call's arguments."""
    call = getattr(where, name)

    def both(*args: Any, **named: Any) -> Any:
        first(*args)
        return call(*args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, both)
        yield


def interrupt(*_: object) -> None:
    """As ctrl-c does."""
    raise KeyboardInterrupt


def stopped_at(block: int, error: BaseException | None = None, kind: type[DeltaStore | PredictionBlocks] = DeltaStore) -> Any:
    """From this block on, none can be written: an interruption, or another error."""

    def stop(_: object, number: int, *args: object) -> None:
        if number >= block:
            raise error or KeyboardInterrupt

    return before(kind, "write_block", stop)


def stopped_training(after: int) -> Any:
    """An interruption of any training after so many steps."""
    steps = itertools.count()
    return before(Trainer, "start", lambda _: next(steps) < after or interrupt())


@contextlib.contextmanager
def counted_blocks(kind: type[DeltaStore | PredictionBlocks] = DeltaStore) -> Any:
    """The blocks written meanwhile, in no order: writers work side by side."""
    written: list[int] = []
    with before(kind, "write_block", lambda _, number, *args: written.append(number)):
        yield written


def redone(ocd: Any, folder: Folder, *words: object) -> list[int]:
    """The blocks that a command writes, in order."""
    with counted_blocks(PredictionBlocks if words[0] == "infer" else DeltaStore) as written:
        ocd(folder, *words)
    return sorted(written)


def slow_down(delay: float, held_after: int) -> None:
    """Slow the passes of the slow project's model down, see `Started`, once collect or infer is at work; for good."""

    def slowed(work: Any) -> Any:
        def slow(*args: Any) -> None:
            os.environ.update(SLOW_FORWARD_S=str(delay), HELD_AFTER_BLOCKS=str(held_after))
            work(*args)

        return slow

    Collector.work, BlockPredictor.work = slowed(Collector.work), slowed(BlockPredictor.work)
