"""npz files written piece by piece, so that none of their arrays need be in memory whole."""

import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.foundation.files import written_whole


@dataclass(frozen=True)
class Streamed:
    """An array on its way: its dtype and shape, and its rows in pieces, in order."""

    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Iterable[np.ndarray]


def save_npz(path: Path, arrays: Mapping[str, Streamed]) -> None:
    """Write an npz file whole: the bytes that `numpy.savez` writes, which depend on nothing but the arrays.

    Raises:
        ValueError: pieces that are not of the dtype and shape they were announced with.
    """
    with written_whole(path) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            # A name given as text has a fixed date.
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
                np.lib.format.write_array_header_1_0(entry, header)
                rows = 0
                for piece in array.pieces:
                    if piece.dtype != array.dtype or piece.shape[1:] != array.shape[1:]:
                        raise ValueError(
                            f"{name}: a piece is {piece.dtype} {piece.shape}, expected {array.dtype} {array.shape}"
                        )
                    rows += len(piece)
                    entry.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))
                if rows != array.shape[0]:
                    raise ValueError(f"{name} has {rows} rows, expected {array.shape[0]}")


def whole(array: np.ndarray) -> Streamed:
    """An array in one piece."""
    return Streamed(array.dtype, array.shape, [array])
