"""An answer of `infer` on its way: predictions in blocks with a ledger, put together in one file when all are there."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from stages.foundation.errors import ArtifactError
from stages.foundation.files import sha256_file, sync_folder, written_whole
from stages.run_directory.format import ChunkRecord
from stages.store.chunks import encode, write
from stages.store.delta_store import CHUNK_BYTES, DELTA, STORE, ArraySpec, chunk_name, lay_out
from stages.store.ledger import LEDGER, Ledger

MOST_BLOCKS, LARGEST_BLOCK, BLOCK_BYTES = 64, 4096, 64 << 20


def prediction_rows(samples: int, batch: int, row_bytes: int) -> int:
    """Rows to a block of an answer: a whole number of batches, about a 64th of it, as far as memory holds them."""
    wanted = min(-(-samples // MOST_BLOCKS), LARGEST_BLOCK, BLOCK_BYTES // max(1, row_bytes))
    return batch * max(1, -(-wanted // batch))


def chunk_rows(batch: int, row_bytes: int) -> int:
    """Rows to a chunk of the sampled deltas: the largest part of a batch that divides it and has at most about 16 MiB."""
    most = max(1, CHUNK_BYTES // row_bytes)
    return max(rows for rows in range(1, min(batch, most) + 1) if batch % rows == 0)


class PredictionBlocks(Ledger):
    """The blocks of an answer: predictions at `folder`/blocks/000000.npz, sampled deltas at `folder`/deltas.zarr.

    Args:
        folder: the unfinished folder.
        samples: inputs.
        rows: inputs to a block.
        fingerprint: of the stage.
        members: of the ensemble; blocks of another do not count.
        delta: one input's sampled deltas, where they are kept.
        batch: inputs that are predicted at once.
    """

    def __init__(
        self, folder: Path, samples: int, rows: int, fingerprint: str, members: int, delta: ArraySpec | None, batch: int
    ) -> None:
        super().__init__(folder, samples, rows, fingerprint, members=members)
        self._delta, self.keeps_deltas = delta, delta is not None
        # Those that are begun with the same batch have the same chunks, and no two blocks share one.
        self._chunk_rows = chunk_rows(batch, delta.row_bytes) if delta else 0

    def create(self) -> None:
        """Lay out the ledger, and the array of the deltas."""
        (self.folder / LEDGER).mkdir(exist_ok=True)
        if self._delta:
            lay_out(self.folder / STORE, {DELTA: self._delta}, self.samples, self._chunk_rows)

    def chunk_names(self, block: int) -> list[str]:
        """The predictions, and the chunks of the deltas."""
        return [self._file(block), *self._delta_names(self.block_range(block))]

    def _file(self, block: int) -> str:
        return f"{LEDGER}/{block:06d}.npz"

    def _delta_names(self, span: range) -> list[str]:
        if not self._delta:
            return []
        chunks = range(span.start // self._chunk_rows, -(-span.stop // self._chunk_rows))
        return [chunk_name(DELTA, chunk, len(self._delta.row_shape)) for chunk in chunks]

    def rows_of(self, blocks: list[int]) -> list[int]:
        """The rows of some blocks."""
        return [row for block in blocks for row in self.block_range(block)]

    def write_deltas(self, span: range, deltas: np.ndarray) -> dict[str, ChunkRecord]:
        """Write a batch's deltas (B, E, out, in); their chunks, for the block's record."""
        if deltas.dtype != np.dtype(self._delta.dtype):
            raise ValueError(f"deltas are {deltas.dtype}, expected {self._delta.dtype}")
        found = {}
        for number, name in enumerate(self._delta_names(span)):
            rows = deltas[number * self._chunk_rows : (number + 1) * self._chunk_rows]
            found[name] = write(self.folder / name, encode(rows, self._chunk_rows))
        return found

    def write_block(self, block: int, arrays: dict[str, np.ndarray], chunks: dict[str, ChunkRecord]) -> None:
        """Write one block's predictions, make them durable, then its record.

        Args:
            block: its number.
            arrays: name to (rows of the block, …).
            chunks: of its deltas, as `write_deltas` gave them.
        """
        name = self._file(block)
        path = self.folder / name
        with written_whole(path) as stream:
            np.savez(stream, **arrays)
        if chunks:
            sync_folder(self.folder / STORE / DELTA)
        entry = ChunkRecord(bytes=path.stat().st_size, sha256=sha256_file(path))
        self.write_record(block, {name: entry, **chunks})

    def read(self, block: int, *names: str) -> dict[str, np.ndarray]:
        """Some arrays of a block, by default all.

        Raises:
            ArtifactError: it is damaged.
        """
        try:
            with np.load(self.folder / self._file(block), allow_pickle=False) as archive:
                return {name: archive[name] for name in names or archive.files}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ArtifactError(
                f"{self.folder / self._file(block)} is damaged: {error}", "run the same command again"
            ) from error

    def put_together(self, path: Path) -> None:
        """Write all blocks as one npz file, a block at a time in memory: the bytes of `numpy.savez`, which depend on the arrays
        alone.

        Raises:
            ArtifactError: blocks that are not done, named, or damaged.
        """
        if missing := [block for block in range(self.blocks) if not self.is_done(block)]:
            raise ArtifactError(f"{self.folder} lacks blocks {missing[:8]}", "run the same command again")
        with written_whole(path) as stream, zipfile.ZipFile(stream, "w") as archive:
            for name, rows in self.read(0).items():
                header = np.lib.format.header_data_from_array_1_0(rows) | {"shape": (self.samples, *rows.shape[1:])}
                # A name given as text has a fixed date.
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array_header_1_0(entry, header)
                    for block in range(self.blocks):
                        entry.write(self.read(block, name)[name].tobytes())
