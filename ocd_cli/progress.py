"""Progress on stderr: a bar with rate and time left on a terminal, plain lines elsewhere, nothing with --quiet."""

import math
import sys
import time
from collections.abc import Iterator

from rich import progress as bars
from rich.console import Console, RenderableType
from rich.text import Text

LINE_SECONDS = 10.0
CURVE_WIDTH, BARS = 24, "▁▂▃▄▅▆▇█"


class Curve:
    """A series so far in one line of characters; as it grows, neighbours are averaged, so that it never takes more memory."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._each, self._sum, self._count = 1, 0.0, 0

    def add(self, value: float) -> None:
        if not math.isfinite(value):
            return
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count == self._each:
            self._means.append(self._sum / self._each)
            self._sum, self._count = 0.0, 0
            if len(self._means) == 2 * CURVE_WIDTH:
                self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
                self._each *= 2

    def __str__(self) -> str:
        shown = self._means
        if len(shown) > CURVE_WIDTH:
            shown = [sum(shown[i : i + 2]) / len(shown[i : i + 2]) for i in range(0, len(shown), 2)]
        if len(shown) < 2:
            return ""
        # Losses fall by orders of magnitude: heights are those of the logarithm, where there is one.
        heights = [math.log(value) for value in shown] if min(shown) > 0 else shown
        low, span = min(heights), max(heights) - min(heights)
        return "".join(BARS[round((height - low) / span * (len(BARS) - 1))] if span > 0 else BARS[0] for height in heights)


class _Bars(bars.Progress):
    """A bar, and below it a line of figures."""

    below = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.below:
            yield Text(f"  {self.below}", no_wrap=True, overflow="crop")


class ShownProgress:
    """A report shown to a person, to be closed at the end."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bars: bars.Progress | None = None
        self._curve = Curve()
        self._stage, self._unit, self._began, self._first, self._last = "", "", 0.0, 0, 0.0

    def start(self, stage: str) -> None:
        """A stage begins."""
        self.close()
        self._stage, self._first, self._last = stage, -1, 0.0
        self._curve = Curve()
        if self._quiet:
            return
        if sys.stderr.isatty():
            self._bars = _Bars(
                bars.SpinnerColumn(),
                bars.TextColumn("{task.description}"),
                bars.BarColumn(),
                bars.MofNCompleteColumn(),
                bars.TextColumn("{task.fields[unit]} {task.fields[rate]}"),
                bars.TimeElapsedColumn(),
                bars.TextColumn("left"),
                bars.TimeRemainingColumn(),
                console=self._console,
            )
            self._bars.start()
            self._bars.add_task(stage, total=None, unit="", rate="")

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
            if "loss" in figures:
                self._curve.add(figures["loss"])
            self._bars.below = "  ".join(filter(None, [text, str(self._curve)]))
            self._bars.update(self._bars.task_ids[0], completed=done, total=total, unit=unit, rate=shown)
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
