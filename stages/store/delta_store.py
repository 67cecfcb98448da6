"""The delta store: a Zarr group of arrays over samples, written block by block with a ledger.

Every array has the same number of rows to a chunk; one row of chunks is a block, the unit of writing and of resuming. A block
is done when its record exists, which is written last and holds the hash of every chunk.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from stages.foundation.errors import ArtifactError
from stages.foundation.files import inside, link_or_copy, remove, sync_folder
from stages.run_directory.format import ArrayDescription, BlockRecord, StoreDescription
from stages.store.chunks import codecs, encode, write
from stages.store.ledger import LEDGER, Ledger

STORE = "deltas.zarr"
CHUNK_BYTES = 16 << 20
LARGEST_BLOCK, SMALL_BLOCK, FEWEST_BLOCKS = 4096, 64, 16
DELTA, FACTORS = "delta", ("delta_output", "delta_input")
RESULT_ARRAYS = ("delta", "rho", "degenerate", "base_loss", "overfit_loss", "steps", "sample_index", *FACTORS)


@dataclass(frozen=True)
class ArraySpec:
    """One array of the store: its dtype and the shape of one row."""

    dtype: str
    row_shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Uncompressed bytes of a row."""
        return int(np.prod(self.row_shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def result_specs(matrix_shape: tuple[int, int], *, factored: bool = False) -> dict[str, ArraySpec]:
    """The arrays that hold what overfitting gave, for deltas of (out, in), or for their factors (out,) and (in,)."""
    if factored:
        delta = {name: ArraySpec("float32", (size,)) for name, size in zip(FACTORS, matrix_shape, strict=True)}
    else:
        delta = {DELTA: ArraySpec("float32", matrix_shape)}
    return delta | {
        "rho": ArraySpec("float32", ()),
        "degenerate": ArraySpec("bool", ()),
        "base_loss": ArraySpec("float32", ()),
        "overfit_loss": ArraySpec("float32", ()),
        "steps": ArraySpec("int32", ()),
        "sample_index": ArraySpec("int64", ()),
    }


def block_rows(specs: dict[str, ArraySpec], samples: int, most: int = LARGEST_BLOCK) -> int:
    """Rows to a block so that the widest array's chunk is about 16 MiB; fewer where `most` says that more would take too long
    to lose, or where a store of `samples` rows would have fewer than sixteen blocks, but not fewer than 64 for that."""
    widest = max(spec.row_bytes for spec in specs.values())
    by_time = min(most, max(SMALL_BLOCK, -(-samples // FEWEST_BLOCKS)))
    return max(1, min(LARGEST_BLOCK, by_time, CHUNK_BYTES // widest))


def create_array(group: zarr.Group, name: str, spec: ArraySpec, samples: int, rows: int) -> zarr.Array:
    """An empty array of `samples` rows, `rows` to a chunk, compressed and with a checksum; floats not yet written are NaN.

    An all-fill chunk is written, too: absent, it could not be told from one that is missing.
    """
    dtype = np.dtype(spec.dtype)
    return group.create_array(
        name,
        shape=(samples, *spec.row_shape),
        chunks=(rows, *spec.row_shape),
        dtype=spec.dtype,
        fill_value=np.nan if dtype.kind == "f" else dtype.type(0),
        compressors=codecs(),
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )


def chunk_name(name: str, block: int, axes: int) -> str:
    """The file of an array's chunk, relative to the stage's folder; `axes` counts those of a row."""
    return f"{STORE}/{name}/{'.'.join(['c', str(block), *['0'] * axes])}"


def is_laid_out(array: zarr.Array, name: str, spec: ArraySpec, samples: int, rows: int) -> bool:
    """Whether Zarr's own description of an array says what it must, down to the names of the chunks: under other names it would
    find none, and read fill values."""
    wanted = create_array(zarr.open_group(zarr.storage.MemoryStore(), mode="w"), name, spec, samples, rows)
    # As text, in which the fill value NaN equals itself.
    return str(array.metadata.to_dict()) == str(wanted.metadata.to_dict())


def lay_out(store: Path, specs: dict[str, ArraySpec], samples: int, rows: int) -> None:
    """Lay out arrays in a group; where they are laid out otherwise (for fewer samples, or damaged), do it again and keep their
    chunks."""
    group = _group(store)
    for name, spec in specs.items():
        try:
            if name in group and is_laid_out(group[name], name, spec, samples, rows):
                continue
        except Exception:
            pass
        remove(store / name / "zarr.json")
        create_array(group, name, spec, samples, rows)


def _group(store: Path) -> zarr.Group:
    try:
        return zarr.open_group(store, mode="a", zarr_format=3)
    except Exception:
        # Its description is damaged; the arrays have their own.
        remove(store / "zarr.json")
        return zarr.open_group(store, mode="a", zarr_format=3)


@dataclass
class Totals:
    """Sums over the rows of a store, put together from its blocks' records."""

    sums: dict[str, float] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)


class DeltaStore(Ledger):
    """A delta store at `folder`/deltas.zarr with its ledger at `folder`/blocks.

    Args:
        folder: the stage's folder.
        specs: the arrays.
        samples: rows.
        rows: rows to a block.
        fingerprint: of the stage; blocks of another do not count.
    """

    def __init__(self, folder: Path, specs: dict[str, ArraySpec], samples: int, rows: int, fingerprint: str) -> None:
        super().__init__(folder, samples, rows, fingerprint)
        self.specs = specs

    @property
    def nbytes(self) -> int:
        """Bytes before compression."""
        return self.samples * sum(spec.row_bytes for spec in self.specs.values())

    def create(self) -> None:
        """Lay out the arrays, as `lay_out`."""
        lay_out(self.folder / STORE, self.specs, self.samples, self.rows)
        (self.folder / LEDGER).mkdir(exist_ok=True)

    def chunk_names(self, block: int) -> list[str]:
        """The files of a block, relative to the stage's folder."""
        return [chunk_name(name, block, len(spec.row_shape)) for name, spec in self.specs.items()]

    def write_block(self, block: int, arrays: dict[str, np.ndarray], **notes: Any) -> None:
        """Write one block's chunks, make them durable, then its record.

        Args:
            block: its number.
            arrays: name to (rows of the block, …), for every array of the store.
            notes: further entries of the record: "sums" over its rows and "skipped" samples.
        """
        span, chunks = self.block_range(block), {}
        for (name, spec), place in zip(self.specs.items(), self.chunk_names(block), strict=True):
            value = arrays[name]
            if value.shape != (len(span), *spec.row_shape) or value.dtype != np.dtype(spec.dtype):
                raise ValueError(f"{name} is {value.dtype} {value.shape}, expected {spec.dtype} {(len(span), *spec.row_shape)}")
            chunks[place] = write(self.folder / place, encode(value, self.rows))
        self.write_record(block, chunks, **notes)

    def adopt(self, finished: Path) -> None:
        """Begin from a finished store: its undamaged whole blocks get a second name here; the others are redone."""
        theirs = DeltaStore(finished, self.specs, self.samples, self.rows, self.fingerprint)
        for block in range(self.blocks):
            if theirs.is_done(block, rehash=True):
                for name in (*self.chunk_names(block), theirs.record_path(block).relative_to(finished).as_posix()):
                    link_or_copy(inside(finished, name), inside(self.folder, name))

    def totals(self) -> Totals:
        """The sums over all blocks, and the hash of every chunk; their names are made durable.

        Raises:
            ArtifactError: blocks that are not done, named.
        """
        missing = [block for block in range(self.blocks) if not self.is_done(block)]
        if missing:
            raise ArtifactError(f"{self.folder / STORE} lacks blocks {missing[:8]}", "run the same command again")
        for name in self.specs:
            sync_folder(self.folder / STORE / name)
        found = Totals()
        for block in range(self.blocks):
            record = BlockRecord.read(self.record_path(block))
            for name, value in record.sums.items():
                found.sums[name] = found.sums.get(name, 0.0) + value
            found.skipped += record.skipped
            found.hashes |= {name: chunk.sha256 for name, chunk in record.chunks.items()}
        return found

    def describe(self) -> StoreDescription:
        """Shapes, dtypes and block size, for the manifest and for readers to check against. A delta that is kept as two factors
        is described as the whole it stands for."""
        arrays = {
            name: ArrayDescription(shape=[self.samples, *spec.row_shape], dtype=spec.dtype) for name, spec in self.specs.items()
        }
        if DELTA not in arrays:
            out, columns = (self.specs[name].row_shape[0] for name in FACTORS)
            arrays[DELTA] = ArrayDescription(shape=[self.samples, out, columns], dtype="float32", factors=list(FACTORS))
        fields = [name for name in self.specs if name not in RESULT_ARRAYS]
        return StoreDescription(samples=self.samples, block_samples=self.rows, arrays=arrays, fields=fields)
