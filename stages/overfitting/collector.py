"""The work of collecting: samples are read ahead, overfitted batch by batch, and compressed and written meanwhile."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stages.foundation.background import Workers, read_ahead
from stages.foundation.config import CollectTable
from stages.foundation.current_device import on
from stages.foundation.memory import AtOnce
from stages.foundation.processes import cores, local_count
from stages.foundation.seeds import seed_of
from stages.foundation.torch_state import theirs_are_usual
from stages.foundation.trees import Tree, leaves, take, to_device
from stages.overfitting.filling import SUMMED, Buffers, Filling, bad_rows
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
MOST_WRITERS = 8


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
        factored=settings.store != "dense",
        watched=task.watched,
    )


def writers(setting: int | str, device: str = "cpu") -> int:
    """Threads that compress and write. Beside a GPU they are what takes time, and share the cores with those that read and
    compute, one each; without, a second one is in the way of computing where there are two cores."""
    if isinstance(setting, int):
        return setting
    if device == "cuda":
        return min(MOST_WRITERS, max(1, cores() // local_count() - 2))
    return min(2, max(1, cores() // 2))


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
        self,
        store: DeltaStore,
        blocks: list[int],
        batch: int,
        writers: int,
        skip_bad: bool,
        on_progress: OnProgress,
        on_smaller: Callable[[int], None] = lambda batch: None,
    ) -> None:
        """Overfit and write some blocks of the store. Reading, computing, and compressing and writing overlap; at most
        `writers` + 2 blocks are in memory. Where a GPU's memory runs out, batches are halved, of which `on_smaller` hears.

        Raises:
            OcdError: faults of the data and the task; numbers that are not finite, unless `skip_bad`; memory that does not do
                for one sample, as does torch.OutOfMemoryError. Blocks finished before are written.
        """
        done, figures = 0, {}

        def written(means: dict[str, float]) -> None:
            figures.update(means)

        read = self._read(store, blocks, batch)
        if not isinstance(self._rows.dataset, ArrayDataset) and theirs_are_usual():
            # Arrays are read faster than a thread can hand them over, and torch's threads would be waited for twice.
            read = read_ahead(read)
        with on(self._device), Workers(writers, 1, written) as workers, contextlib.closing(read):
            filling = Filling(store, self._device, workers, writers + 2, skip_bad)
            at_once = AtOnce(batch, tell=on_smaller)
            for positions, given in read:
                overfit = functools.partial(self._overfitted, filling, store.rows, positions.start, given)
                for part, found, room in at_once.each(positions, overfit):
                    filling.put(part, found, room)
                    done += len(part)
                    on_progress(done, figures)

    def _overfitted(
        self, filling: Filling, block_rows: int, start: int, given: tuple[Tree, Tree], positions: range
    ) -> tuple[range, Buffers, Tensor | None]:
        """Some of the rows from `start` on that were given, overfitted; and the room their deltas were left in, if any."""
        its, room = take(given, slice(positions.start - start, positions.stop - start)), filling.room(positions)
        # What a model does with its samples it does in every block.
        check = positions.start % block_rows == 0
        return positions, filling.cast(self.overfit_batch(positions, its, room, check)), room

    def _read(self, store: DeltaStore, blocks: list[int], batch: int) -> Iterator[tuple[range, tuple[Tree, Tree]]]:
        """Batches to overfit: parts of a block, or on a GPU, which small ones keep waiting, several blocks that follow one
        another."""
        most = max(1, batch // store.rows) if self._device.type == "cuda" else 1
        for group in _runs(blocks, most):
            first, last = store.block_range(group[0]), store.block_range(group[-1])
            size = last.stop - first.start if most > 1 else batch
            for start in range(first.start, last.stop, size):
                positions = range(start, min(last.stop, start + size))
                yield positions, self._rows.batch(positions)


def _runs(numbers: Sequence[int], most: int) -> Iterator[list[int]]:
    """Numbers that follow one another, at most so many together."""
    run: list[int] = []
    for number in numbers:
        if run and (len(run) == most or number != run[-1] + 1):
            yield run
            run = []
        run.append(number)
    if run:
        yield run


def is_finite(x: Tree) -> bool:
    """Whether every number of some inputs is finite."""
    return all(bool(torch.isfinite(leaf).all()) for leaf in leaves(x).values())
