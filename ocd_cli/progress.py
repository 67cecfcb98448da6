"""Progress on stderr: a bar with rate and time left on a terminal, plain lines elsewhere, nothing with --quiet."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_SECONDS = 10.0


class ShownProgress:
    """A report shown to a person; use it as a context manager."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bars: Progress | None = None
        self._stage, self._unit, self._began, self._first, self._last = "", "", 0.0, 0, 0.0

    def __enter__(self) -> "ShownProgress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def start(self, stage: str) -> None:
        """A stage begins."""
        self.close()
        self._stage, self._first, self._last = stage, -1, 0.0
        if self._quiet:
            return
        if sys.stderr.isatty():
            self._bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]} {task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
            )
            self._bars.start()
            self._bars.add_task(stage, total=None, unit="", rate="", figures="")

    def progress(self, done: int, total: int, unit: str, **figures: float) -> None:
        """Some of it is finished."""
        if self._quiet:
            return
        now = time.monotonic()
        if self._first < 0 or unit != self._unit:
            # What an earlier process had finished says nothing about the rate.
            self._first, self._began, self._last, self._unit = done, now, now, unit
        elapsed = now - self._began
        rate = (done - self._first) / elapsed if elapsed > 0.5 and done > self._first else None
        shown = f"{rate:,.0f}/s" if rate and rate >= 10 else f"{rate:.2g}/s" if rate else ""
        text = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
        if self._bars:
            self._bars.update(self._bars.task_ids[0], completed=done, total=total, unit=unit, rate=shown, figures=text)
        elif now - self._last >= LINE_SECONDS or (done >= total and elapsed > 0):
            self._last = now
            left = f", {(total - done) / rate:,.0f} s left" if rate and done < total else ""
            parts = [f"{self._stage}: {done:,} of {total:,} {unit}", shown + left, text]
            print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)

    def message(self, text: str) -> None:
        """One line worth reading."""
        if self._quiet:
            return
        if self._bars:
            self._console.print(f"{self._stage}: {text}", markup=False)
        else:
            print(f"{self._stage or 'ocd'}: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar away before something else is printed."""
        if self._bars:
            self._bars.stop()
            self._bars = None
