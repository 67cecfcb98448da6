"""The delta store as both trainings read it: a few rows held out, the others in batches, from memory or from the disk."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from stages.diffusion.conditioning import Fields
from stages.diffusion.delta_batch import DeltaBatch, usable_split
from stages.diffusion.neighbour_encoder import NEIGHBOURS
from stages.foundation.files import available_memory
from stages.foundation.memory import free_on_gpu
from stages.foundation.processes import local_count
from stages.run_directory.pipeline import AUTO
from stages.store.delta_store import DELTA, FACTORS
from stages.store.reader import StoreReader
from stages.store.shuffler import Rows, Shuffler, in_batches
from stages.training.store_neighbours import StoreNeighbours

# Rows that are shuffled among each other lie in a buffer of this size; it decides the order, so it is no setting.
BUFFER_BYTES = 512 << 20
# Of the memory that is free, what the store may take.
MEMORY_SHARE = 0.5
# What a training may want of each delta: nothing, its output vector u, or the whole.
NOTHING, VECTORS, WHOLE = "nothing", "output vectors", "whole deltas"
GPU_MEMORY_SHARE = 0.25


class TrainingBatches:
    """Rows of a store for one training.

    The order of the rows depends on the seed and the store alone: where they lie (in the GPU's memory, in the machine's, on the
    disk) makes no difference to it.

    Args:
        deltas: what is wanted of them beside the conditioning; of output vectors (B, out, 1) is made.
        held_out: part held out.
        memory: GiB that the store may take, or "auto".
        neighbours: of the store's rows, what is said of them is a further field.

    Raises:
        ComputeError: fewer than two rows are usable.
        ArtifactError: the store is damaged.
    """

    def __init__(
        self,
        reader: StoreReader,
        *,
        deltas: str,
        held_out: float,
        batch_size: int,
        seed: int,
        device: torch.device,
        memory: float | str,
        neighbours: StoreNeighbours | None = None,
    ) -> None:
        self._reader, self._device, self._neighbours = reader, device, neighbours
        arrays = reader.description.arrays
        factors = arrays[DELTA].factors
        self._of_delta = {NOTHING: [], VECTORS: FACTORS[:1], WHOLE: factors or [DELTA]}[deltas]
        self._names = [*self._of_delta, *reader.field_names()]
        self._rho = reader.read("rho")
        known = [torch.from_numpy(reader.read(name)) for name in ("degenerate", "rho", "sample_index")]
        train, held = usable_split(*known, held_out, seed)
        # Of a sample there may be several rows.
        self.held_out_samples = len(known[-1][held].unique())
        self._usable = np.zeros(len(reader), bool)
        self._usable[train.numpy()] = True
        self.count, self.batch_size = len(train), min(batch_size, len(train))
        buffer_blocks = max(1, BUFFER_BYTES // (reader.block_samples * reader.nbytes(self._names) // len(reader)))
        self._shuffler = Shuffler(len(reader), reader.block_samples, seed, buffer_blocks, self._usable)
        self._resident: dict[str, Tensor] | Rows | None = self._load(memory)
        if neighbours is not None and self._on_gpu:
            self._neighbours = neighbours.to(device)
        self.held_out = self._some(held.numpy())

    @property
    def place(self) -> str:
        """Where the rows lie, for people."""
        if self._resident is None:
            return "read from the disk while training"
        return "kept on the GPU" if self._on_gpu else "kept in memory"

    @property
    def _on_gpu(self) -> bool:
        return self._resident is not None and isinstance(next(iter(self._resident.values())), Tensor)

    def _load(self, memory: float | str) -> dict[str, Tensor] | Rows | None:
        """The whole store, where it may be kept."""
        needed = self._reader.nbytes(self._names)
        on_gpu = self._device.type == "cuda" and memory == AUTO and needed <= GPU_MEMORY_SHARE * free_on_gpu(self._device)
        allowed = MEMORY_SHARE * (available_memory() or 0) if memory == AUTO else memory * 2**30
        if not on_gpu and needed > allowed / local_count():
            return None
        device = self._device if on_gpu else "cpu"
        arrays = {name: self._reader.description.arrays[name] for name in self._names}
        kept = {
            name: torch.empty(array.shape, dtype=getattr(torch, array.dtype), device=device) for name, array in arrays.items()
        }
        for start, stop in self._spans():
            for name, values in kept.items():
                values[start:stop] = torch.from_numpy(self._reader.read(name, start, stop))
        return kept if on_gpu else {name: values.numpy() for name, values in kept.items()}

    def _spans(self) -> Iterator[tuple[int, int]]:
        return map(self._reader.span, range(self._reader.blocks))

    def parts(self) -> Iterator[dict[str, Tensor]]:
        """The conditioning of all rows for training, in parts, each field (n, …)."""
        for start, stop in self._spans():
            kept = self._usable[start:stop]
            if kept.any():
                read = {name: self._reader.read(name, start, stop)[kept] for name in self._reader.field_names()}
                fields = {name: torch.from_numpy(value) for name, value in read.items()}
                yield self._with_neighbours(start + np.flatnonzero(kept), fields)

    @property
    def rho(self) -> Tensor:
        """ρ of all rows for training, (count,)."""
        return torch.from_numpy(self._rho[self._usable])

    def batches(self, step: int, share: slice = slice(None)) -> Iterator[DeltaBatch]:
        """The batches of the steps from `step` (counted from 0) on, without end, `batch_size` rows each: epochs are seeded
        permutations, and a batch may straddle two of them; `share` is the part of each that is wanted."""
        drawn = self._shuffler.endless(step * self.batch_size)
        if self._resident is None:
            for found in self._reader.batches(self._names, drawn, self.batch_size):
                yield self._batch(found.pop("row")[share], {name: value[share] for name, value in found.items()})
        else:
            for found in in_batches(({"row": rows} for rows in drawn), self.batch_size):
                yield self._some(found["row"][share])

    def blame(self, numbers: Tensor, errors: Tensor) -> str:
        """The samples whose loss is worst, by their numbers in the user's training set, for a message; of rows in the store,
        (B,), with their losses, (B,)."""
        lost = ~torch.isfinite(errors)
        worst = numbers[lost] if lost.any() else numbers[errors.argsort(descending=True)]
        samples = self._reader.read("sample_index")[worst[:5].numpy()].tolist()
        return f" (samples {', '.join(map(str, samples))}{' …' if len(worst) > 5 else ''})"

    def _some(self, rows: np.ndarray) -> DeltaBatch:
        """Rows by number."""
        if self._resident is None:
            found = self._reader.take(self._names, rows)
            return self._batch(found.pop("row"), found)
        if self._on_gpu:
            # Page-locked, for a copy that would otherwise wait for all that the GPU has before it.
            at = torch.from_numpy(rows).pin_memory().to(self._device, non_blocking=True)
            return self._batch(rows, {name: value[at] for name, value in self._resident.items()})
        return self._batch(rows, {name: value[rows] for name, value in self._resident.items()})

    def _batch(self, numbers: np.ndarray, arrays: dict[str, Tensor] | Rows) -> DeltaBatch:
        tensors = {name: torch.as_tensor(value) for name, value in arrays.items()}
        left, right = [*(tensors.pop(name) for name in self._of_delta), None, None][:2]
        if right is not None:
            deltas = left[:, :, None] * right[:, None, :]
        else:
            deltas = left.reshape(*left.shape[:2], -1) if left is not None else None
        fields = self._with_neighbours(numbers, tensors)
        return DeltaBatch(fields, torch.from_numpy(self._rho[numbers]), deltas, torch.from_numpy(numbers))

    def _with_neighbours(self, numbers: np.ndarray, fields: Fields) -> Fields:
        if self._neighbours is None:
            return fields
        return fields | {NEIGHBOURS: self._neighbours.tokens(torch.from_numpy(numbers), fields)}
