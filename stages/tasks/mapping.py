"""Arrays of large npz files, read from the file when they are asked for."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Smaller arrays are read: what becomes of their file afterwards is no matter then.
LARGE = 64 << 20
PIECE_BYTES = 1 << 20


def mapped_array(path: Path, name: str) -> np.ndarray | None:
    """An array of an npz file as it lies there, neither read nor checked; None where it is compressed or not laid out in rows.

    Raises:
        OSError, ValueError, zipfile.BadZipFile: as `numpy.load`.
    """
    with zipfile.ZipFile(path) as archive:
        entry = archive.NameToInfo.get(f"{name}.npy")
    if entry is None or entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        return None
    with path.open("rb") as stream:
        # The lengths of name and extra field as they stand before the data; the directory's own may differ.
        stream.seek(entry.header_offset)
        head = stream.read(30)
        start = entry.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        stream.seek(start)
        version = np.lib.format.read_magic(stream)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if head[:4] != b"PK\x03\x04" or version not in readers:
            return None
        shape, fortran_order, dtype = readers[version](stream)
        offset = stream.tell()
    nbytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if (
        dtype.hasobject
        or not shape
        or not nbytes
        or (fortran_order and len(shape) > 1)
        or entry.file_size != offset - start + nbytes
    ):
        return None
    return np.asarray(np.memmap(path, dtype, "r", offset, shape))


def large_array(path: Path, name: str) -> np.ndarray | None:
    """As `mapped_array`, of an array of numbers that is large, once every byte was checked; None where it had better be read.

    Raises:
        OSError, ValueError, zipfile.BadZipFile: as `numpy.load`.
    """
    found = mapped_array(path, name)
    if found is None or found.nbytes < LARGE or found.dtype.kind not in "fiub":
        return None
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as entry:
        # It compares its checksum at the end.
        while entry.read(PIECE_BYTES):
            pass
    return found


class MappedRows:
    """Rows of an array in a file, as tensors of their own when they are asked for.

    Args:
        array: (N, …).
        dtype: of the tensors.
    """

    def __init__(self, array: np.ndarray, dtype: np.dtype) -> None:
        self._array, self._dtype = array, dtype
        self.shape = array.shape

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, rows: int | slice | Tensor) -> Tensor:
        # A tensor of the file's own memory would not begin where numbers of its size may begin.
        found = self._array[rows.numpy() if isinstance(rows, Tensor) else rows]
        return torch.from_numpy(np.array(found, dtype=self._dtype, order="C"))
