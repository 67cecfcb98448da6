"""The work of collecting: samples are read ahead, overfitted batch by batch, and compressed and written meanwhile."""

import contextlib
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stages.foundation.background import Workers, read_ahead
from stages.foundation.config import CollectTable
from stages.foundation.errors import ComputeError
from stages.foundation.processes import cores
from stages.foundation.seeds import seed_of
from stages.foundation.torch_state import theirs_are_usual
from stages.foundation.trees import Tree, leaves, to_device
from stages.overfitting.overfitter import Overfitter
from stages.overfitting.recipe import Views, recipe_of
from stages.per_sample.layer import Layer
from stages.per_sample.single_precision import tolerance_of
from stages.store.delta_store import DELTA, FACTORS, DeltaStore, Totals
from stages.tasks.conditioning import fields_of
from stages.tasks.data import ArrayDataset, Split
from stages.tasks.independence import check_row
from stages.tasks.loader import forward, losses
from stages.tasks.protocol import Task
from stages.tasks.views import any_views, has_views, views_of

# Samples overfitted so far, and the mean losses of the last block written.
OnProgress = Callable[[int, dict[str, float]], None]
Buffers = dict[str, Tensor]
SUMMED = ("rho", "degenerate", "base_loss", "overfit_loss", "steps")


def make_overfitter(task: Task, model: nn.Module, layer: Layer, settings: CollectTable, given: tuple[Tree, Tree]) -> Overfitter:
    """How a task's samples are overfitted; `given` are a few of them, (x, y)."""
    device = layer.weight(model).device
    return Overfitter(
        model,
        layer,
        lambda net, batch: forward(task, net, batch),
        lambda output, labels: losses(task, output, labels),
        recipe_of(settings),
        to_device(any_views(task, *given)[0], device),
        views=has_views(task),
        factored=settings.store == "factored",
        watched=task.watched,
    )


def writers(setting: int | str) -> int:
    """Threads that compress and write: a second one is in the way of computing where there are two cores."""
    return setting if isinstance(setting, int) else min(2, max(1, cores() // 2))


def summary_of(layer: Layer, store: DeltaStore, totals: Totals, overfitter: Overfitter, repeats: int) -> dict[str, Any]:
    """Figures worth printing of a store that is whole, which holds `repeats` rows a sample."""
    good = max(1, store.samples - len(totals.skipped))
    return {
        "layer": layer.name,
        "shape": list(layer.matrix_shape),
        "samples": store.samples // repeats,
        **({"repeats": repeats} if repeats > 1 else {}),
        "blocks": store.blocks,
        "degenerate": int(totals.sums["degenerate"]),
        "skipped": sorted(set(totals.skipped)),
        **{name: totals.sums[name] / good for name in ("base_loss", "overfit_loss", "rho", "steps")},
        "method": overfitter.name,
        "method_reason": overfitter.reason,
        "prefix_reused": overfitter.prefix is not None,
    }


class Collector:
    """Overfits rows of a split and writes them into a delta store.

    Args:
        task: gives views and conditioning.
        overfitter: overfits a batch.
        layer_kind: the type of the layer's module.
        rows: the samples, in the store's order; each as often as it is overfitted, one after the other.
        device: where to compute.
        seed: of the run, for views.
        repeats: how often each is overfitted.
    """

    def __init__(
        self,
        task: Task,
        overfitter: Overfitter,
        layer_kind: type,
        rows: Split,
        device: torch.device,
        seed: int,
        repeats: int = 1,
    ) -> None:
        self._task, self._overfitter, self._layer_kind = task, overfitter, layer_kind
        self._rows, self._device, self._seed, self._repeats = rows, device, seed, repeats

    def confirm(self, positions: Sequence[int], given: tuple[Tree, Tree]) -> None:
        """Compare the overfitter with the plain loop on some rows, given as (x, y)."""
        x, y = (to_device(tree, self._device) for tree in given)
        self._overfitter.confirm(x, y, self._views(positions, given))

    def seconds_per_sample(self, positions: range) -> float:
        """How long overfitting takes, measured on a few rows."""
        given, start = self._rows.batch(positions), time.perf_counter()
        # To have the numbers on the CPU is to have waited for them.
        bad_rows({name: value.cpu().numpy() for name, value in self.overfit_batch(positions, given, check=False).items()})
        return (time.perf_counter() - start) / len(positions)

    def overfit_batch(
        self, positions: Sequence[int], given: tuple[Tree, Tree], out: Tensor | None = None, check: bool = True
    ) -> Buffers:
        """Overfit some rows, given as (x, y), and capture their conditioning: array name to (B, …). The deltas may be left in
        `out`; `check` as `Overfitter.overfit`."""
        numbers = self._rows.rows[torch.as_tensor(positions)]
        x, y = (to_device(tree, self._device) for tree in given)
        first = self._overfitter.first_pass(x)
        fields, _ = fields_of(self._task, self._layer_kind, x, first.output, first.captured)
        if check and len(numbers) > 1:
            row = seed_of("independence", int(positions[0])) % len(numbers)
            name, values = f"{self._rows.name}[{int(numbers[row])}]", losses(self._task, first.output, y)
            model = self._overfitter.model
            # By the very forward pass that gave the batch's output.
            check_row(
                self._task,
                lambda one: self._overfitter.forward(model, one),
                tolerance_of(model),
                x,
                y,
                first.output,
                values,
                row,
                name,
            )
        found = self._overfitter.overfit(first, x, y, self._views(positions, given), out, check)
        delta = dict(zip(FACTORS, found.delta, strict=True)) if isinstance(found.delta, tuple) else {DELTA: found.delta}
        results = {name: getattr(found, name) for name in SUMMED}
        return {**delta, **results, "sample_index": numbers, **fields}

    def _views(self, positions: Sequence[int], given: tuple[Tree, Tree]) -> Views | None:
        """What each sample shows of itself at a gradient step; None: always all of it. A repeat has other parts drawn."""
        if not has_views(self._task):
            return None
        numbers = self._rows.rows[torch.as_tensor(positions)].tolist()
        repeats = [int(position) % self._repeats for position in positions]

        def at(step: int) -> tuple[Tree, Tree]:
            # What there is to draw without repeats is drawn first.
            seeds = [
                (self._seed, "collect", row, step, *([repeat] if repeat else []))
                for row, repeat in zip(numbers, repeats, strict=True)
            ]
            return tuple(to_device(tree, self._device) for tree in views_of(self._task, *given, seeds))

        return at

    def work(
        self, store: DeltaStore, blocks: list[int], batch: int, writers: int, skip_bad: bool, on_progress: OnProgress
    ) -> None:
        """Overfit and write some blocks of the store. Reading, computing, and compressing and writing overlap; at most
        `writers` + 2 blocks are in memory.

        Raises:
            OcdError: faults of the data and the task; numbers that are not finite, unless `skip_bad`. Blocks finished before
                are written.
        """
        free: queue.Queue[Buffers] = queue.Queue()
        made, done, figures = 0, 0, {}

        def written(means: dict[str, float]) -> None:
            figures.update(means)

        read = self._read(store, blocks, batch)
        if not isinstance(self._rows.dataset, ArrayDataset) and theirs_are_usual():
            # Arrays are read faster than a thread can hand them over, and torch's threads would be waited for twice.
            read = read_ahead(read)
        with Workers(writers, 1, written) as workers, contextlib.closing(read):
            for block, positions, given in read:
                span = store.block_range(block)
                if positions.start == span.start:
                    if free.empty() and made < writers + 2:
                        made += 1
                        free.put(self._buffers(store))
                    workers.collect_until(lambda: not free.empty())
                    buffers = free.get_nowait()
                rows = slice(positions.start - span.start, positions.stop - span.start)
                deltas = buffers[DELTA][rows] if DELTA in buffers and self._device.type == "cpu" else None
                # What a model does with its samples it does in every block.
                check = positions.start == span.start
                for name, value in self.overfit_batch(positions, given, deltas, check).items():
                    if value is not deltas:
                        buffers[name][rows].copy_(value, non_blocking=self._device.type == "cuda")
                done += len(positions)
                on_progress(done, figures)
                if positions.stop == span.stop:
                    workers.submit(_Writing(store, block, buffers, free, self._arrival(), skip_bad))

    def _read(self, store: DeltaStore, blocks: list[int], batch: int) -> Iterator[tuple[int, range, tuple[Tree, Tree]]]:
        for block in blocks:
            span = store.block_range(block)
            for start in range(span.start, span.stop, batch):
                positions = range(start, min(span.stop, start + batch))
                yield block, positions, self._rows.batch(positions)

    def _buffers(self, store: DeltaStore) -> Buffers:
        """Host memory for a block, page-locked where a GPU writes to it."""
        rows, pinned = min(store.rows, store.samples), self._device.type == "cuda"
        return {
            name: torch.empty(rows, *spec.row_shape, dtype=getattr(torch, spec.dtype), pin_memory=pinned)
            for name, spec in store.specs.items()
        }

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


def is_finite(x: Tree) -> bool:
    """Whether every number of some inputs is finite."""
    return all(bool(torch.isfinite(leaf).all()) for leaf in leaves(x).values())


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
