"""Files of the user's data: what they must hold, and what is said where they do not."""

import io
import re
import zipfile

import numpy as np
import pytest
import torch
from refusals import refusal

from stages.foundation.errors import DataError
from stages.tasks.data import load_npz

X, Y = np.arange(12.0).reshape(6, 2), np.arange(6) % 3


@pytest.fixture
def path(tmp_path):
    return tmp_path / "train.npz"


def refused(path, labels=True):
    """The message of the one error that a file is refused with, without the file's path."""
    message, hint = refusal(DataError, load_npz, path, labels=labels)
    assert message.startswith(str(path))
    assert hint
    return message.removeprefix(str(path))


# Files


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    ("given", "taken"),
    [
        *((given, torch.float32) for given in (np.float64, np.float32, np.float16, ">f8")),
        *((given, torch.int64) for given in (np.int64, np.int32, np.int8, np.bool_)),
    ],
)
def test_dtypes(path, save, given, taken):
    save(path, x=X.astype(given), y=Y.astype(np.uint8))
    found = load_npz(path, labels=True)
    assert (found.x.dtype, found.y.dtype) == (taken, torch.int64)
    assert found.x.tolist() == X.astype(given).tolist()
    assert found.y.tolist() == Y.tolist()
    assert len(found) == 6
    assert found[4][0].tolist() == X.astype(given)[4].tolist()
    assert int(found[4][1]) == 1


def test_axes_in_fortran_order_keep_their_places(path):
    np.savez(path, x=np.asfortranarray(X), y=Y)
    assert load_npz(path, labels=True).x.tolist() == X.tolist()


def test_labels_may_be_numbers_with_fractions(path):
    np.savez(path, x=X, y=X[:, :1] / 3)
    assert load_npz(path, labels=True).y.dtype == torch.float32


def test_labels_that_may_be_missing(path):
    np.savez(path, x=X)
    found = load_npz(path, labels=False)
    assert found.y is None
    assert found[2][1] is None
    np.savez(path, x=X, y=Y)
    assert load_npz(path, labels=False).y.tolist() == Y.tolist()


# What a file holds, and the message.
ARRAYS = {
    "no y": ({"x": X, "labels": Y}, " has no array y; it has x, labels"),
    "neither": ({"inputs": X, "labels": Y}, " has no array x or y; it has inputs, labels"),
    "nothing": ({}, " has no array x or y; it has none"),
    "dates": ({"x": X, "y": np.zeros(6, dtype="datetime64[s]")}, ": y has dtype datetime64[s], expected numbers"),
    "unlike lengths": ({"x": np.zeros((1200, 2)), "y": np.zeros(7)}, ": x has 1,200 rows, y has 7"),
    "too large for single precision": ({"x": np.where(X == 8, 1e300, X), "y": Y}, ": x[4] is not finite"),
}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_are_refused(path, name):
    arrays, says = ARRAYS[name]
    np.savez(path, **arrays)
    assert refused(path) == says


def test_what_is_refused_says_how_to_write_it(path):
    np.savez(path, inputs=X, labels=Y)
    assert refused(path, labels=False) == " has no array x; it has inputs, labels"
    assert 'write one with numpy.savez("train.npz", x=x, y=y)' in refusal(DataError, load_npz, path, labels=True)[1]


@pytest.mark.parametrize("save", [np.savez, np.save])
def test_inputs_alone(path, save):
    with path.open("wb") as file:
        save(file, X) if save is np.save else save(file, x=X)
    found = load_npz(path, labels=False)
    assert (found.x.tolist(), found.y) == (X.tolist(), None)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.where(X == 9, np.nan, X), ": x[4] is not finite"),
        (X[:0], " is empty: x has shape (0, 2)"),
        (np.float32(3), ": x is a single number, expected one row per sample"),
        (np.array(["a"] * 6), ": x has dtype <U1, expected numbers"),
        (np.array([{}] * 6), " is not an npz or npy file: Array can't be memory-mapped: Python objects in dtype."),
    ],
)
def test_inputs_alone_with_faults(path, array, says):
    with path.open("wb") as file:
        np.save(file, array)
    assert refused(path, labels=False) == says


def test_inputs_alone_cut_short(path):
    with path.open("wb") as file:
        np.save(file, X)
    path.write_bytes(path.read_bytes()[:-8])
    assert refused(path, labels=False).startswith(" is not an npz or npy file: ")


@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_an_npy_file_is_left_in_its_place(tmp_path, dtype):
    x = np.arange(200).reshape(50, 4).astype(dtype)
    np.save(tmp_path / "new.npy", x)
    loaded = load_npz(tmp_path / "new.npy", labels=False)
    found = np.load(tmp_path / "new.npy", mmap_mode="r+")
    found[3] = 7
    found.flush()
    assert loaded.x[3].tolist() == [7] * 4
    loaded.x[3] = 8
    assert found[3].tolist() == [7] * 4


@pytest.mark.parametrize("row", [0, 5, 4095, 4096, 9000])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_first_row_that_is_not_finite_is_named(path, row, value):
    """Rows are looked at 4,096 at a time; the number is the file's."""
    x = np.zeros((9100, 2), dtype=np.float32)
    x[row, 1] = x[9050, 0] = value
    np.savez(path, x=x, y=np.zeros(9100))
    assert refused(path) == f": x[{row}] is not finite"
    np.savez(path, x=np.zeros(9100), y=x)
    assert refused(path) == f": y[{row}] is not finite"


@pytest.mark.parametrize("part", [0.0, 0.3, 0.6, 0.95])
def test_file_cut_short(path, part):
    np.savez(path, x=np.random.default_rng(0).normal(size=(50, 4)), y=np.zeros(50))
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    assert refused(path).startswith(" is not an npz file: ")


def test_flipped_byte(path):
    np.savez(path, x=np.random.default_rng(0).normal(size=(50, 4)), y=np.zeros(50))
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    assert refused(path) == " is not an npz file: Bad CRC-32 for file 'x.npy'"


def test_damaged_compressed_file(path):
    """What is damaged may be the compressed stream itself, before any checksum is reached."""
    np.savez_compressed(path, x=np.random.default_rng(0).normal(size=(50, 4)), y=np.zeros(50))
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("x.npy")
    content = bytearray(path.read_bytes())
    head = content[entry.header_offset : entry.header_offset + 30]
    start = entry.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    # Three bits begin a deflate block; all set they are none of its types.
    content[start] |= 0b111
    path.write_bytes(content)
    assert refused(path).startswith(" is not an npz file: ")


def test_archive_with_a_password(path):
    """Marked as encrypted, which numpy never writes but archivers do."""
    np.savez(path, x=X, y=Y)
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        for match in re.finditer(re.escape(signature), bytes(content)):
            content[match.start() + flags] |= 1
    path.write_bytes(content)
    assert refused(path).startswith(" is not an npz file: ")


def test_a_file_without_a_name_ending(tmp_path):
    """What counts is what a file holds."""
    content = io.BytesIO()
    np.savez(content, x=X, y=Y)
    path = tmp_path / "data"
    path.write_bytes(content.getvalue())
    assert len(load_npz(path, labels=True)) == 6
