"""Several processes at one stage: each has its part of the blocks; the last to finish gives the folder its final name."""

import contextlib
import errno
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from filelock import lock_descriptor

from stages.foundation.errors import SettingsError, TryAgainError

WAIT = "wait for it to end, then run the same command again"
# What a file system answers that has no locks, such as Lustre mounted without the option flock.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


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


# All the blocks: the part of a process that works alone.
WHOLE = Part(1, 1)


def lock_path(run: Path, name: str) -> Path:
    """Where the lock called `name` lies."""
    return run / ".locks" / f"{name.replace('/', '-')}.lock"


@contextlib.contextmanager
def held(run: Path, name: str, part: Part = WHOLE, tell: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a part of a stage, beside other parts of the same number of parts; the lock dies with this process. Where the file
    system has no locks, the whole is worked on without, and `tell` hears of it once.

    Raises:
        TryAgainError: another process holds the part, or the others divide the work otherwise.
        SettingsError: a part, where the file system has no locks.
    """
    path = lock_path(run, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = path.with_suffix(f".{part.number}-of-{part.count}.part")
    with mine.open("ab") as stream:
        try:
            with gate(path):
                _refuse_beside_others(path, name, part)
                if not _lock(stream):
                    what = name if part == WHOLE else f"{name} --part {part}"
                    raise TryAgainError(f"{what} is in use by {_holder(mine)}", WAIT)
                # For messages only: a disk without room for it is no obstacle.
                with contextlib.suppress(OSError):
                    _name_file(mine).write_text(_whoami(), encoding="utf-8")
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            _go_without(run, part, error, tell)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                _name_file(mine).unlink()


@contextlib.contextmanager
def gate(path: Path) -> Iterator[None]:
    """Wait until nobody else is in here; without locks there is nobody else.

    Within a stage's own lock its parts are taken and looked at: who only looks is not taken for one at work.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as stream:
        _lock_if_there_are_locks(stream)
        yield


def holders(run: Path, name: str) -> list[str]:
    """Who works on a stage at this moment, a line each; nothing is made or changed."""
    path = lock_path(run, name)
    if not path.exists():
        return []
    # Of what cannot be locked nobody can tell: no locks, or a folder that may only be read.
    with contextlib.suppress(OSError), _opened(path) as stream:
        _lock(stream, wait=True)
        return [text for _, text in _at_work(path)]
    return []


def _lock(stream: BinaryIO, *, wait: bool = False) -> bool:
    """Lock an open file until it is closed, or this process dies; False where another process has it. Of a descriptor filelock
    takes the system's own lock or none, never a file in its place, which would outlive its process."""
    return lock_descriptor(stream.fileno(), blocking=wait, poll_interval=0.01)


def _lock_if_there_are_locks(stream: BinaryIO) -> None:
    try:
        _lock(stream, wait=True)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def _opened(path: Path) -> BinaryIO:
    """A lock's file, for looking: some file systems lock only what may be written."""
    return path.open("r+b" if os.access(path, os.W_OK) else "rb")


def _at_work(path: Path) -> list[tuple[Part, str]]:
    """The parts of a stage that some process works on, and which, by number; inside the stage's own lock."""
    found = []
    for file in path.parent.glob(f"{path.stem}.*.part"):
        with _opened(file) as stream:
            if not _lock(stream):
                number, count = re.search(r"\.(\d+)-of-(\d+)\.part$", file.name).groups()
                part = Part(int(number), int(count))
                found.append((part, _holder(file) + ("" if part == WHOLE else f" (part {part})")))
    return sorted(found, key=lambda entry: (entry[0].count, entry[0].number))


def _refuse_beside_others(path: Path, name: str, part: Part) -> None:
    others = [(other, text) for other, text in _at_work(path) if other.count != part.count]
    if others:
        divided = f" --part {part}: others have divided the work in another way:"
        how = " is in use by" if part == WHOLE or others[0][0] == WHOLE else divided
        raise TryAgainError(f"{name}{how} {'; '.join(text for _, text in others)}", WAIT)


def _name_file(part_file: Path) -> Path:
    """Where the holder's name stands: beside the lock, for Windows lets nobody read a file that is locked."""
    return part_file.with_suffix(".holder")


def _holder(part_file: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return _name_file(part_file).read_text(encoding="utf-8").strip() or "another process"
    return "another process"


def _whoami() -> str:
    return f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"


# File systems without locks of which has been told, by their device's number.
_told: set[int] = set()


def _go_without(run: Path, part: Part, error: OSError, tell: Callable[[str], None] | None) -> None:
    """Work alone, after a warning.

    Raises:
        SettingsError: a part was asked for.
    """
    what = f"the file system of {run} has no locks ({error.strerror})"
    if part != WHOLE:
        raise SettingsError(
            f"--part {part}: {what}, without which parts cannot be told apart",
            "mount it with the option flock (Lustre), name a folder elsewhere with --run, or leave out --part",
        ) from error
    device = run.stat().st_dev
    if tell and device not in _told:
        _told.add(device)
        tell(f"warning: {what}: nothing keeps a second command off the same stage; the mount option flock (Lustre) does")
