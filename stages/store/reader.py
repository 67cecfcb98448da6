"""Reading a finished delta store: whole arrays, rows in order, or batches in a shuffled order for training."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import zarr

from stages.foundation.background import read_ahead
from stages.foundation.errors import ArtifactError
from stages.run_directory.folders import MANIFEST
from stages.run_directory.format import Manifest, StoreDescription
from stages.store.delta_store import STORE, ArraySpec, chunk_name, is_laid_out
from stages.store.shuffler import Rows, Shuffler, in_batches

# Threads that read and decompress blocks for a buffer.
READERS = 2
MEND_HINT = "ocd verify names the blocks; ocd collect then redoes them"


class StoreReader:
    """Reads a finished delta store.

    Args:
        folder: the stage's folder.
        description: what the manifest says of the store; every array's metadata is checked against it first.

    Raises:
        ArtifactError: an array is missing, or has another shape or dtype.
    """

    def __init__(self, folder: Path, description: StoreDescription) -> None:
        self.path, self.description = folder / STORE, description
        try:
            self._group = zarr.open_group(self.path, mode="r", zarr_format=3)
            kept = {name: wanted for name, wanted in description.arrays.items() if wanted.factors is None}
            self._arrays = {name: self._group[name] for name in kept}
            for name, wanted in kept.items():
                array = self._arrays[name]
                if list(array.shape) != wanted.shape or array.dtype != np.dtype(wanted.dtype):
                    raise ArtifactError(
                        f"{self.path}/{name} is {array.dtype} {array.shape}, "
                        f"its manifest says {wanted.dtype} {tuple(wanted.shape)}",
                        "redo it with: ocd collect --force",
                    )
                spec = ArraySpec(wanted.dtype, tuple(wanted.shape[1:]))
                if not is_laid_out(array, name, spec, len(self), self.block_samples):
                    raise ArtifactError(f"{self.path}/{name}/zarr.json lays the array out in another way", MEND_HINT)
        except (KeyError, ValueError, FileNotFoundError, TypeError) as error:
            raise ArtifactError(f"{self.path} cannot be opened: {error}", "ocd verify names what is damaged") from error

    @classmethod
    def of(cls, folder: Path | str) -> "StoreReader":
        """The reader of a finished stage's folder, `run/collect`, described by its manifest.

        Raises:
            ArtifactError: there is no such store, or it is laid out otherwise than its manifest says.
        """
        path = Path(folder) / MANIFEST
        if (description := Manifest.read(path).store) is None:
            raise ArtifactError(f"{path} describes no delta store", "name the folder of collect, run/collect")
        return cls(Path(folder), description)

    def __len__(self) -> int:
        return self.description.samples

    @property
    def block_samples(self) -> int:
        """Rows to a block."""
        return self.description.block_samples

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-len(self) // self.block_samples)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of an array, by default all, (N, …); a delta that is kept as factors is put together.

        Raises:
            ArtifactError: a chunk is damaged.
        """
        factors = self.description.arrays[name].factors
        if factors:
            left, right = (self.read(factor, start, stop) for factor in factors)
            return left[:, :, None] * right[:, None, :]
        stop = len(self) if stop is None else stop
        self._require_chunks(name, range(start // self.block_samples, -(-stop // self.block_samples)))
        try:
            return self._arrays[name][start:stop]
        except (ValueError, OSError, RuntimeError) as error:
            raise ArtifactError(f"{self.path}/{name} is damaged: {error}", MEND_HINT) from error

    def _require_chunks(self, name: str, blocks: range) -> None:
        """Refuse a missing chunk: it would read back as its fill value, without an error."""
        axes = len(self.description.arrays[name].shape) - 1
        for block in blocks:
            if not (self.path.parent / chunk_name(name, block, axes)).is_file():
                raise ArtifactError(f"{self.path.parent / chunk_name(name, block, axes)} is missing", MEND_HINT)

    def field_names(self) -> list[str]:
        """The conditioning arrays: those that are not part of the fixed record of overfitting."""
        return list(self.description.fields)

    def nbytes(self, names: list[str]) -> int:
        """Bytes of some arrays in memory."""
        arrays = self.description.arrays
        return sum(int(np.prod(arrays[name].shape, dtype=np.int64)) * np.dtype(arrays[name].dtype).itemsize for name in names)

    def take(self, names: list[str], rows: np.ndarray) -> Rows:
        """Some rows of some arrays, in the order asked for, and their numbers as "row"; each block is read once."""
        return next(self._buffers(names, iter([rows])))

    def shuffled(
        self,
        names: list[str],
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        buffer_blocks: int = 4,
        usable: np.ndarray | None = None,
    ) -> Iterator[Rows]:
        """One epoch of batches in an order that is random but for locality: blocks are drawn without replacement,
        `buffer_blocks` of them at a time share a buffer, and its rows are drawn from it in a random order.

        The next buffer is read and decompressed meanwhile, so that two of them are in memory. The order depends on seed and
        epoch alone.

        Args:
            names: arrays to read.
            batch_size: rows to a batch; only the last is smaller.
            seed: of the run.
            epoch: another epoch is another order.
            buffer_blocks: blocks to a buffer.
            usable: (N,) bool, rows that may be drawn; None: all.

        Yields:
            name to (batch_size, …), and "row" to the rows' numbers (batch_size,).

        Raises:
            ArtifactError: a chunk is damaged.
        """
        shuffler = Shuffler(len(self), self.block_samples, seed, buffer_blocks, usable)
        yield from self.batches(names, shuffler.epoch(epoch), batch_size)

    def batches(self, names: list[str], drawn: Iterator[np.ndarray], batch_size: int) -> Iterator[Rows]:
        """Rows in batches, buffer by buffer as a `Shuffler` draws them; the next buffer is read and decompressed meanwhile."""
        return in_batches(read_ahead(self._buffers(names, drawn), ahead=1), batch_size)

    def span(self, block: int) -> tuple[int, int]:
        """The first row of a block, and the one after its last."""
        first = block * self.block_samples
        return first, min(len(self), first + self.block_samples)

    def _buffers(self, names: list[str], drawn: Iterator[np.ndarray]) -> Iterator[Rows]:
        """Rows of each buffer, read block by block."""
        with ThreadPoolExecutor(READERS) as pool:
            for rows in drawn:
                buffer = self._empty(names, len(rows))
                buffer["row"][:] = rows
                blocks = rows // self.block_samples
                places = [np.flatnonzero(blocks == block) for block in np.unique(blocks)]
                list(pool.map(lambda at, buffer=buffer: self._fill(buffer, names, at), places))
                yield buffer

    def _empty(self, names: list[str], count: int) -> Rows:
        arrays = self.description.arrays
        found = {name: np.empty((count, *arrays[name].shape[1:]), arrays[name].dtype) for name in names}
        return {"row": np.empty(count, np.int64), **found}

    def _fill(self, buffer: Rows, names: list[str], places: np.ndarray) -> None:
        """Read one block and put those of its rows that the buffer wants in their places."""
        rows = buffer["row"][places]
        start, stop = self.span(int(rows[0]) // self.block_samples)
        for name in names:
            buffer[name][places] = self.read(name, start, stop)[rows - start]


def field_widths(store: StoreDescription) -> dict[str, int]:
    """How many numbers a row of each conditioning array has, by the store's description."""
    return {name: math.prod(store.arrays[name].shape[1:]) for name in store.fields}
