"""Writing whole chunks of the arrays that `create_array` lays out, as bytes: several threads at once, hashed on the way.

Zarr lays the arrays out and reads them. It would write them too, but takes a millisecond of Python for every chunk of every
array, which the threads that compute would have to wait for; so the two codecs the arrays are made with are applied here. That
Zarr reads back what was written is tested.
"""

import hashlib
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs import Zstd

from stages.foundation.files import write_pieces
from stages.run_directory.format import ChunkRecord

LEVEL = 1


def codecs() -> list[Any]:
    """What every chunk goes through, as Zarr knows it: compression, then a checksum."""
    return [zarr.codecs.ZstdCodec(level=LEVEL), zarr.codecs.Crc32cCodec()]


def encode(rows: np.ndarray, count: int) -> tuple[bytes, bytes]:
    """A chunk's bytes, as `codecs` make them: compressed, and the checksum that follows.

    Args:
        rows: (n, …), n ≤ count.
        count: rows to a chunk; a shorter last chunk is filled up with zeros, which nobody reads.
    """
    if len(rows) < count:
        rows = np.concatenate([rows, np.zeros((count - len(rows), *rows.shape[1:]), rows.dtype)])
    compressed = bytes(Zstd(level=LEVEL).encode(np.ascontiguousarray(rows, rows.dtype.newbyteorder("<"))))
    return compressed, google_crc32c.value(compressed).to_bytes(4, "little")


def write(path: Path, pieces: tuple[bytes, ...]) -> ChunkRecord:
    """Write a chunk whole and make it durable; its size and hash, as the ledger has them.

    One fsync for each chunk, before the block's record is there: with several writers they share the file system's commits, and
    neither one for all of a block's chunks nor syncfs, which waits for other programs' files, was faster beyond the disk's own
    noise. To leave it to the end would let a part that lost its machine look whole to the others.
    """
    write_pieces(path, *pieces)
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return ChunkRecord(bytes=sum(map(len, pieces)), sha256=found.hexdigest())
