"""Several processes at one stage: each has its part of the blocks; the last to finish gives the folder its final name."""

import contextlib
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from stages.foundation.errors import SettingsError, TryAgainError

WAIT = "wait for it to end, then run the same command again"


@dataclass(frozen=True)
class Part:
    """A worker's share of the blocks: the i-th of n, counted from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """From "2/8".

        Raises:
            SettingsError: it has another form, or is out of range.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise SettingsError(f"--part {text}: expected i/n with 1 <= i <= n", "for example: --part 2/8")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @staticmethod
    def check(part: "Part | None", blocks: int, smaller: str) -> None:
        """Refuse more parts than blocks.

        Args:
            part: if any.
            blocks: how many there are.
            smaller: how to have more, "smaller … with …".

        Raises:
            SettingsError: with both numbers.
        """
        if part and part.count > blocks:
            raise SettingsError(
                f"--part {part}: more parts than blocks, of which there are {blocks}",
                f"use fewer parts, or {smaller}",
            )

    def has(self, block: int) -> bool:
        """Whether a block is this worker's."""
        return block % self.count == self.number - 1


def lock_path(run: Path, name: str) -> Path:
    """Where the lock called `name` lies."""
    path = run / ".locks" / f"{name.replace('/', '-')}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _whoami() -> str:
    return f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[TextIO]:
    """Hold a lock for this process alone; it dies with it, and says meanwhile who holds it.

    Raises:
        TryAgainError: another process holds it.
    """
    with path.open("a+", encoding="utf-8") as stream:
        try:
            _take(stream)
        except BlockingIOError as error:
            holder = "; ".join(sharing(path)) or _text(stream) or "another process"
            raise TryAgainError(f"{what} is in use by {holder}", WAIT) from error
        stream.truncate(0)
        stream.write(_whoami())
        stream.flush()
        try:
            yield stream
        finally:
            stream.truncate(0)


def _take(stream: TextIO) -> None:
    """Lock a file, not put off by one who only looks whether it is locked.

    Raises:
        BlockingIOError: another process holds it.
    """
    for last in (False, False, False, True):
        try:
            return fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if last:
                raise
            time.sleep(0.02)


def _text(stream: TextIO) -> str:
    stream.seek(0)
    return stream.read().strip()


@contextlib.contextmanager
def gate(path: Path) -> Iterator[None]:
    """Wait until nobody else is in here."""
    with path.open("a+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def shared(path: Path, what: str, part: Part) -> Iterator[None]:
    """Hold a lock together with the other parts of the same number of parts.

    Raises:
        TryAgainError: a process holds it alone, another one works on the same part, or the others divide the work otherwise.
    """
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(path.open("a+", encoding="utf-8"))
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TryAgainError(f"{what} is in use by {_text(stream) or 'another process'}", WAIT) from error
        # Nobody holds it alone: what it says is of a process that was killed.
        stream.truncate(0)
        with gate(path.with_suffix(".begin")):
            others = [other for other in _held_parts(path) if not other.name.endswith(f"-of-{part.count}.part")]
            if others:
                raise TryAgainError(
                    f"{what} --part {part}: others have divided the work in another way: {'; '.join(map(_describe, others))}",
                    WAIT,
                )
            own = path.with_suffix(f".{part.number}-of-{part.count}.part")
            stack.enter_context(locked(own, f"{what} --part {part}"))
        yield


def _held_parts(path: Path) -> list[Path]:
    """The lock files of parts that some process works on."""
    found = []
    for other in sorted(path.parent.glob(f"{path.stem}.*.part")):
        with other.open("a+") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(other)
    return found


def _describe(part_file: Path) -> str:
    number, count = re.search(r"\.(\d+)-of-(\d+)\.part$", part_file.name).groups()
    return f"{part_file.read_text(encoding='utf-8').strip()} (part {number}/{count})"


def sharing(path: Path) -> list[str]:
    """Who works on parts of a stage, a line each."""
    return [_describe(other) for other in _held_parts(path)]


def holders(run: Path, name: str) -> list[str]:
    """Who works on a stage at this moment, a line each; nothing is made or changed."""
    path = run / ".locks" / f"{name.replace('/', '-')}.lock"
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return [_text(stream) or "another process"]
    return sharing(path)
