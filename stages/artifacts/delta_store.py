"""The delta store: a Zarr group of arrays over samples, written block by block with a ledger.

Every array has the same number of rows to a chunk; one row of chunks is a block, the unit of writing and of resuming. A block
is done when its record exists, which is written last and holds the hash of every chunk.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from stages.artifacts.files import (
    inside,
    link_or_copy,
    read_json,
    remove,
    sha256_file,
    sync_file,
    sync_folder,
    write_json,
)
from stages.errors import ArtifactError

STORE, LEDGER = "deltas.zarr", "blocks"
CHUNK_BYTES = 8 << 20
LARGEST_BLOCK = 4096


@dataclass(frozen=True)
class ArraySpec:
    """One array of the store: its dtype and the shape of one row."""

    dtype: str
    row_shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Uncompressed bytes of a row."""
        return int(np.prod(self.row_shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def block_rows(specs: dict[str, ArraySpec]) -> int:
    """Rows to a block so that the widest array's chunk is about 8 MiB, at most 4,096; independent of the number of samples,
    so that a store can grow."""
    widest = max(spec.row_bytes for spec in specs.values())
    return max(1, min(LARGEST_BLOCK, CHUNK_BYTES // widest))


def create_array(group: zarr.Group, name: str, spec: ArraySpec, samples: int, rows: int) -> zarr.Array:
    """An empty array of `samples` rows, `rows` to a chunk, compressed and with a checksum; floats not yet written are NaN."""
    dtype = np.dtype(spec.dtype)
    return group.create_array(
        name,
        shape=(samples, *spec.row_shape),
        chunks=(rows, *spec.row_shape),
        dtype=spec.dtype,
        fill_value=np.nan if dtype.kind == "f" else dtype.type(0),
        compressors=[zarr.codecs.ZstdCodec(level=1), zarr.codecs.Crc32cCodec()],
    )


class DeltaStore:
    """A delta store at `folder`/deltas.zarr with its ledger at `folder`/blocks.

    Args:
        folder: the stage's folder.
        specs: the arrays.
        samples: rows.
        rows: rows to a block.
        fingerprint: of the stage; blocks of another do not count.
    """

    def __init__(self, folder: Path, specs: dict[str, ArraySpec], samples: int, rows: int, fingerprint: str) -> None:
        self.folder, self.specs, self.samples, self.rows, self.fingerprint = folder, specs, samples, rows, fingerprint

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.samples // self.rows)

    def block_range(self, block: int) -> range:
        """The rows of a block."""
        return range(block * self.rows, min(self.samples, (block + 1) * self.rows))

    def create(self) -> None:
        """Lay out the arrays; where they exist with another number of samples, give them the new one and keep their chunks."""
        self._sweep()
        group = zarr.open_group(self.folder / STORE, mode="a", zarr_format=3)
        (self.folder / LEDGER).mkdir(exist_ok=True)
        for name, spec in self.specs.items():
            shape = (self.samples, *spec.row_shape)
            if name in group:
                if group[name].shape != shape:
                    group[name].resize(shape)
                continue
            create_array(group, name, spec, self.samples, self.rows)

    def _sweep(self) -> None:
        """Remove what a kill may have left half-written."""
        for pattern in ("*.partial", "*.tmp"):
            for path in self.folder.rglob(pattern):
                remove(path)

    def chunk_names(self, block: int) -> list[str]:
        """The files of a block, relative to the stage's folder."""
        return [f"{STORE}/{name}/c/{'/'.join([str(block), *['0'] * len(spec.row_shape)])}" for name, spec in self.specs.items()]

    def record_path(self, block: int) -> Path:
        """The ledger's record of a block."""
        return self.folder / LEDGER / f"{block:06d}.json"

    def is_done(self, block: int) -> bool:
        """Whether a block's record exists, is of this stage and this range, and its chunks have the sizes it says."""
        if not self.record_path(block).exists():
            return False
        try:
            record = read_json(self.record_path(block))
            span = self.block_range(block)
            if record["fingerprint"] != self.fingerprint or record["samples"] != [span.start, span.stop]:
                return False
            return all(inside(self.folder, name).stat().st_size == chunk["bytes"] for name, chunk in record["chunks"].items())
        except (ArtifactError, OSError, KeyError, TypeError):
            return False

    def pending(self) -> list[int]:
        """The blocks not yet done; records past the end or of unfinished blocks are removed."""
        for path in (self.folder / LEDGER).glob("*.json"):
            if not path.stem.isdigit() or int(path.stem) >= self.blocks or not self.is_done(int(path.stem)):
                remove(path)
        return [block for block in range(self.blocks) if not self.is_done(block)]

    def write_block(self, block: int, arrays: dict[str, np.ndarray]) -> None:
        """Write one block's chunks, make them durable, then its record.

        Args:
            block: its number.
            arrays: name to (rows of the block, …), for every array of the store.
        """
        span = self.block_range(block)
        # An all-fill chunk must be written too: absent, it could not be told from one that is missing.
        with zarr.config.set({"array.write_empty_chunks": True}):
            self._write_chunks(span, arrays)
        chunks = {}
        for name in self.chunk_names(block):
            path = self.folder / name
            sync_file(path)
            sync_folder(path.parent)
            chunks[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        record = {"fingerprint": self.fingerprint, "block": block, "samples": [span.start, span.stop], "chunks": chunks}
        write_json(self.record_path(block), record)

    def _write_chunks(self, span: range, arrays: dict[str, np.ndarray]) -> None:
        group = zarr.open_group(self.folder / STORE, mode="r+")
        for name, spec in self.specs.items():
            value = arrays[name]
            if value.shape != (len(span), *spec.row_shape):
                raise ValueError(f"{name} has shape {value.shape}, expected {(len(span), *spec.row_shape)}")
            group[name][span.start : span.stop] = value

    def adopt(self, finished: Path) -> None:
        """Begin from a finished, smaller store: its whole blocks get a second name here; the last, shorter one is redone."""
        for path in (finished / LEDGER).glob("*.json"):
            for name in read_json(path)["chunks"]:
                link_or_copy(inside(finished, name), inside(self.folder, name))
            link_or_copy(path, self.folder / LEDGER / path.name)

    def check_complete(self) -> None:
        """Refuse a store with a block or a row missing.

        Raises:
            ArtifactError: naming them.
        """
        missing = [block for block in range(self.blocks) if not self.is_done(block)]
        if missing:
            raise ArtifactError(f"{self.folder / STORE} lacks blocks {missing[:8]}", "run the same command again")
        reader = StoreReader(self.folder, self.describe())
        unwritten = np.flatnonzero(np.isnan(reader.read("rho")))
        if len(unwritten):
            raise ArtifactError(f"{self.folder / STORE}: row {unwritten[0]} was never written", "run ocd collect --force")

    def describe(self) -> dict[str, Any]:
        """Shapes, dtypes and block size, for the manifest and for readers to check against."""
        arrays = {name: {"shape": [self.samples, *spec.row_shape], "dtype": spec.dtype} for name, spec in self.specs.items()}
        fields = [name for name in self.specs if name not in RESULT_ARRAYS]
        return {"samples": self.samples, "block_samples": self.rows, "arrays": arrays, "fields": fields}


class StoreReader:
    """Reads a finished delta store.

    Args:
        folder: the stage's folder.
        description: what the manifest says of the store; every array's metadata is checked against it first.

    Raises:
        ArtifactError: an array is missing, or has another shape or dtype.
    """

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        self.path, self.description = folder / STORE, description
        try:
            self._group = zarr.open_group(self.path, mode="r", zarr_format=3)
            for name, wanted in description["arrays"].items():
                array = self._group[name]
                if list(array.shape) != wanted["shape"] or array.dtype != np.dtype(wanted["dtype"]):
                    raise ArtifactError(
                        f"{self.path}/{name} is {array.dtype} {array.shape}, "
                        f"its manifest says {wanted['dtype']} {tuple(wanted['shape'])}",
                        "redo it with: ocd collect --force",
                    )
        except (KeyError, ValueError, FileNotFoundError, TypeError) as error:
            raise ArtifactError(f"{self.path} cannot be opened: {error}", "ocd verify names what is damaged") from error

    def __len__(self) -> int:
        return self.description["samples"]

    def read(self, name: str) -> np.ndarray:
        """A whole array, (N, …).

        Raises:
            ArtifactError: a chunk is damaged.
        """
        try:
            return self._group[name][:]
        except (ValueError, OSError, RuntimeError) as error:
            raise ArtifactError(
                f"{self.path}/{name} is damaged: {error}", "ocd verify names the chunks; redo with: ocd collect --force"
            ) from error

    def field_names(self) -> list[str]:
        """The conditioning arrays: those that are not part of the fixed record of overfitting."""
        return list(self.description["fields"])

    def nbytes(self, names: list[str]) -> int:
        """Uncompressed bytes of some arrays."""
        arrays = self.description["arrays"]
        return sum(
            int(np.prod(arrays[name]["shape"], dtype=np.int64)) * np.dtype(arrays[name]["dtype"]).itemsize for name in names
        )


RESULT_ARRAYS = ("delta", "rho", "degenerate", "base_loss", "overfit_loss", "steps", "sample_index")


def result_specs(matrix_shape: tuple[int, int]) -> dict[str, ArraySpec]:
    """The arrays that hold what overfitting gave, for deltas of (out, in)."""
    return {
        "delta": ArraySpec("float32", matrix_shape),
        "rho": ArraySpec("float32", ()),
        "degenerate": ArraySpec("bool", ()),
        "base_loss": ArraySpec("float32", ()),
        "overfit_loss": ArraySpec("float32", ()),
        "steps": ArraySpec("int32", ()),
        "sample_index": ArraySpec("int64", ()),
    }
