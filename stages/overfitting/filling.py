"""From overfitted batches to written blocks: host memory for a few blocks goes round between who computes and who writes."""

import queue
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.foundation.background import Workers
from stages.foundation.errors import ComputeError
from stages.store.delta_store import DELTA, FACTORS, DeltaStore

# Array name to (rows, …).
Buffers = dict[str, Tensor]
SUMMED = ("rho", "degenerate", "base_loss", "overfit_loss", "steps")


class Filling:
    """Puts batches into the memory of blocks, and has those that are full written.

    Args:
        store: where to.
        device: where batches come from.
        workers: threads that write.
        most: blocks in memory.
        skip_bad: whether samples whose numbers are not finite are left out.
    """

    def __init__(
        self, store: DeltaStore, device: torch.device, workers: Workers[dict[str, float]], most: int, skip_bad: bool
    ) -> None:
        self._store, self._device, self._workers, self._skip_bad = store, device, workers, skip_bad
        self._free: queue.Queue[Buffers] = queue.Queue()
        self._most, self._made = most, 0
        self._block, self._buffers = -1, {}

    def room(self, rows: range) -> Tensor | None:
        """Where the deltas of some rows of one block may be left at once; None where they have to be copied."""
        if self._device.type != "cpu" or DELTA not in self._store.specs:
            return None
        self._turn_to(rows.start // self._store.rows)
        first = self._store.block_range(self._block).start
        return self._buffers[DELTA][rows.start - first : rows.stop - first]

    def cast(self, arrays: Buffers) -> Buffers:
        """Arrays in the store's dtypes and layout, where they are: nothing more is asked of a GPU's memory afterwards."""
        return {name: value.to(getattr(torch, self._store.specs[name].dtype)).contiguous() for name, value in arrays.items()}

    def put(self, rows: range, arrays: Buffers, left: Tensor | None = None) -> None:
        """Copy some rows, which may go over several blocks, and hand over the blocks whose last row is among them; `left` are
        deltas that were left where they belong."""
        at = rows.start
        while at < rows.stop:
            self._turn_to(at // self._store.rows)
            span = self._store.block_range(self._block)
            stop = min(rows.stop, span.stop)
            for name, value in arrays.items():
                if value is not left:
                    target = self._buffers[name][at - span.start : stop - span.start]
                    target.copy_(value[at - rows.start : stop - rows.start], non_blocking=self._device.type == "cuda")
            if stop == span.stop:
                self._workers.submit(
                    _Writing(self._store, self._block, self._buffers, self._free, self._arrival(), self._skip_bad)
                )
            at = stop

    def _turn_to(self, block: int) -> None:
        """Have memory for a block, when its first rows come."""
        if block == self._block:
            return
        if self._free.empty() and self._made < self._most:
            self._made += 1
            self._free.put(self._make())
        self._workers.collect_until(lambda: not self._free.empty())
        self._block, self._buffers = block, self._free.get_nowait()

    def _make(self) -> Buffers:
        """Host memory for a block, page-locked where a GPU writes to it, if the system lets us have it."""
        rows, pinned = min(self._store.rows, self._store.samples), self._device.type == "cuda"
        shapes = {
            name: {"size": (rows, *spec.row_shape), "dtype": getattr(torch, spec.dtype)}
            for name, spec in self._store.specs.items()
        }
        try:
            return {name: torch.empty(**shape, pin_memory=pinned) for name, shape in shapes.items()}
        except RuntimeError:
            if not pinned:
                raise
            return {name: torch.empty(**shape) for name, shape in shapes.items()}

    def _arrival(self) -> Callable[[], None]:
        """Waits until everything that was copied so far has arrived in host memory."""
        if self._device.type != "cuda":
            return lambda: None
        event = torch.cuda.Event()
        # By name: whoever uses a collector may have another device as the current one.
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize


class _Writing:
    """One block on its way to the disk, finished by a writer thread."""

    def __init__(
        self,
        store: DeltaStore,
        block: int,
        buffers: Buffers,
        free: "queue.Queue[Buffers]",
        arrive: Callable[[], None],
        skip_bad: bool,
    ) -> None:
        self._store, self._block, self._buffers, self._free = store, block, buffers, free
        self._arrive, self._skip_bad = arrive, skip_bad

    def __call__(self) -> dict[str, float]:
        """Check, write, give the memory back; mean losses before and after."""
        try:
            self._arrive()
            count = len(self._store.block_range(self._block))
            arrays = {name: value[:count].numpy() for name, value in self._buffers.items()}
            bad = bad_rows(arrays)
            if bad.any() and not self._skip_bad:
                raise not_finite(int(arrays["sample_index"][bad.argmax()]))
            skipped = arrays["sample_index"][bad].tolist()
            sums: dict[str, Any] = {name: float(arrays[name][~bad].sum(dtype=np.float64)) for name in SUMMED}
            _blank(arrays, bad)
            self._store.write_block(self._block, arrays, sums=sums, skipped=skipped)
            good = max(1, count - len(skipped))
            return {name: sums[name] / good for name in ("base_loss", "overfit_loss")}
        finally:
            self._free.put(self._buffers)


def bad_rows(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The rows with a number that is not finite, (B,) bool; the delta's show in its norm."""
    bad = np.zeros(len(arrays["rho"]), bool)
    for name, value in arrays.items():
        if name not in (DELTA, *FACTORS) and value.dtype.kind == "f":
            bad |= ~np.isfinite(value).reshape(len(value), -1).all(1)
    return bad


def not_finite(row: int) -> ComputeError:
    """What is said of a sample whose numbers are not finite."""
    return ComputeError(
        f"overfitting sample {row} gave numbers that are not finite",
        "try a smaller collect.lr, remove that sample, or leave such samples out with --set collect.skip_bad=true",
    )


def _blank(arrays: dict[str, np.ndarray], bad: np.ndarray) -> None:
    """Samples left out keep their row: a zero delta, degenerate, so that no training draws it."""
    if bad.any():
        for name, value in arrays.items():
            if name != "sample_index":
                value[bad] = name == "degenerate"
