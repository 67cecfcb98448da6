"""How the library tells what it is doing: it calls back, and whoever called decides what to show."""

import contextlib
import time
from pathlib import Path
from typing import Any, Protocol


class Report(Protocol):
    """What a command passes to a stage to hear of its progress."""

    def start(self, stage: str) -> None:
        """A stage begins to work."""

    def progress(self, done: int, total: int, unit: str, **figures: float) -> None:
        """`done` of `total` units are finished; `figures` are worth showing beside them."""

    def message(self, text: str) -> None:
        """One line worth reading."""


class Silent:
    """A report nobody listens to."""

    def start(self, stage: str) -> None:
        """Ignore it."""

    def progress(self, done: int, total: int, unit: str, **figures: float) -> None:
        """Ignore it."""

    def message(self, text: str) -> None:
        """Ignore it."""


class Logged:
    """Passes everything on, and keeps messages, and progress at most every ten seconds, in a stage's `log.txt`."""

    def __init__(self, report: Report, path: Path) -> None:
        self._report, self._path, self._last = report, path, 0.0

    def start(self, stage: str) -> None:
        """Note the stage's start."""
        self._write(f"start {stage}")
        self._report.start(stage)

    def progress(self, done: int, total: int, unit: str, **figures: Any) -> None:
        """Note the progress."""
        if time.monotonic() - self._last >= 10 or done >= total:
            self._last = time.monotonic()
            rest = "".join(f" {name}={value:.6g}" for name, value in figures.items())
            self._write(f"{done}/{total} {unit}{rest}")
        self._report.progress(done, total, unit, **figures)

    def message(self, text: str) -> None:
        """Note the message."""
        self._write(text)
        self._report.message(text)

    def _write(self, text: str) -> None:
        # Another part of the same work may have put its name on the whole, and the folder is gone from here.
        with contextlib.suppress(FileNotFoundError), self._path.open("a", encoding="utf-8") as stream:
            stream.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")
