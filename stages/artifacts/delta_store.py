"""The delta store: a Zarr group of arrays over samples, written block by block with a ledger.

Every array has the same number of rows to a chunk; one row of chunks is a block, the unit of writing and of resuming. A block
is done when its record exists, which is written last and holds the hash of every chunk.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from stages.artifacts.chunks import codecs, encode, write
from stages.artifacts.files import digest, inside, link_or_copy, read_json, remove, sha256_file, sync_folder, write_json
from stages.errors import ArtifactError, OcdError

STORE, LEDGER = "deltas.zarr", "blocks"
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
    by_time = max(SMALL_BLOCK, min(most, -(-samples // FEWEST_BLOCKS)))
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


def record_hash(record: dict[str, Any]) -> str:
    """What a block's record says of itself in `sha256`: the hash of all else in it."""
    return digest({key: value for key, value in record.items() if key != "sha256"})


@dataclass
class Totals:
    """Sums over the rows of a store, put together from its blocks' records."""

    sums: dict[str, float] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)


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

    @property
    def nbytes(self) -> int:
        """Bytes before compression."""
        return self.samples * sum(spec.row_bytes for spec in self.specs.values())

    def block_range(self, block: int) -> range:
        """The rows of a block."""
        return range(block * self.rows, min(self.samples, (block + 1) * self.rows))

    def create(self) -> None:
        """Lay out the arrays; where they are laid out otherwise (for fewer samples, or damaged), do it again and keep their
        chunks."""
        group = self._group()
        (self.folder / LEDGER).mkdir(exist_ok=True)
        for name, spec in self.specs.items():
            try:
                if name in group and is_laid_out(group[name], name, spec, self.samples, self.rows):
                    continue
            except Exception:
                pass
            remove(self.folder / STORE / name / "zarr.json")
            create_array(group, name, spec, self.samples, self.rows)

    def _group(self) -> zarr.Group:
        try:
            return zarr.open_group(self.folder / STORE, mode="a", zarr_format=3)
        except Exception:
            # Its description is damaged; the arrays have their own.
            remove(self.folder / STORE / "zarr.json")
            return zarr.open_group(self.folder / STORE, mode="a", zarr_format=3)

    def chunk_names(self, block: int) -> list[str]:
        """The files of a block, relative to the stage's folder."""
        return [chunk_name(name, block, len(spec.row_shape)) for name, spec in self.specs.items()]

    def record_path(self, block: int) -> Path:
        """The ledger's record of a block."""
        return self.folder / LEDGER / f"{block:06d}.json"

    def is_done(self, block: int, *, rehash: bool = False) -> bool:
        """Whether a block's record exists, is of this stage and range, and its chunks have the sizes (and hashes) it says."""
        if not self.record_path(block).exists():
            return False
        try:
            record = read_json(self.record_path(block))
            span = self.block_range(block)
            wanted = (self.fingerprint, [span.start, span.stop], record_hash(record), set(self.chunk_names(block)))
            if (record["fingerprint"], record["samples"], record["sha256"], set(record["chunks"])) != wanted:
                return False
            return not any(damage_of(self.folder, name, entry, rehash) for name, entry in record["chunks"].items())
        except (ArtifactError, OSError, KeyError, TypeError, AttributeError):
            return False

    @property
    def records(self) -> int:
        """Blocks that the ledger has a record of."""
        return len(list((self.folder / LEDGER).glob("*.json")))

    def pending(self, blocks: Iterable[int] | None = None, *, rehash: bool = False) -> list[int]:
        """Those of the blocks (by default all) that are not done; their records, if any, are removed."""
        found = []
        for block in range(self.blocks) if blocks is None else blocks:
            if not self.is_done(block, rehash=rehash):
                remove(self.record_path(block))
                found.append(block)
        return found

    def trim(self) -> None:
        """Remove records past the end, or of other names."""
        for path in (self.folder / LEDGER).glob("*.json"):
            if not path.stem.isdigit() or int(path.stem) >= self.blocks:
                remove(path)

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
        record = {
            "fingerprint": self.fingerprint,
            "block": block,
            "samples": [span.start, span.stop],
            "chunks": chunks,
            **notes,
        }
        write_json(self.record_path(block), record | {"sha256": record_hash(record)})

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
            record = read_json(self.record_path(block))
            for name, value in record.get("sums", {}).items():
                found.sums[name] = found.sums.get(name, 0.0) + value
            found.skipped += record.get("skipped", [])
            found.hashes |= {name: entry["sha256"] for name, entry in record["chunks"].items()}
        return found

    def describe(self) -> dict[str, Any]:
        """Shapes, dtypes and block size, for the manifest and for readers to check against. A delta that is kept as two factors
        is described as the whole it stands for."""
        arrays = {name: {"shape": [self.samples, *spec.row_shape], "dtype": spec.dtype} for name, spec in self.specs.items()}
        if DELTA not in arrays:
            out, columns = (self.specs[name].row_shape[0] for name in FACTORS)
            arrays[DELTA] = {"shape": [self.samples, out, columns], "dtype": "float32", "factors": list(FACTORS)}
        fields = [name for name in self.specs if name not in RESULT_ARRAYS]
        return {"samples": self.samples, "block_samples": self.rows, "arrays": arrays, "fields": fields}


def damage_of(folder: Path, name: str, entry: dict[str, Any], rehash: bool = True) -> str:
    """What is wrong with a chunk whose record says `entry`; "" where nothing is."""
    path = inside(folder, name)
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{name} has {size:,} bytes, expected {entry['bytes']:,}"
    return f"content changed: {name}" if rehash and sha256_file(path) != entry["sha256"] else ""


def ledger_problems(folder: Path, fingerprint: str) -> list[str]:
    """Hash every chunk of a store again and compare with its ledger; what is wrong, a line each.

    Args:
        folder: the stage's folder, finished or not.
        fingerprint: of the stage.
    """
    problems = []
    for path in sorted((folder / LEDGER).glob("*.json")):
        try:
            record = read_json(path)
            if record["fingerprint"] != fingerprint:
                problems.append(f"{LEDGER}/{path.name} is of another store")
            if record["sha256"] != record_hash(record) or path.stem != f"{record['block']:06d}":
                problems.append(f"content changed: {LEDGER}/{path.name}")
            found = (damage_of(folder, name, entry) for name, entry in record["chunks"].items())
            problems += [f"block {path.stem}: {text}" for text in found if text]
        except (OcdError, OSError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{LEDGER}/{path.name} is not a block's record: {error}")
    return problems
