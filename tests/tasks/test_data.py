"""The user's data: what a file must hold and what is said where it does not; batches of any kind; identity; splits."""

import io
import re
import zipfile

import numpy as np
import pytest
import torch

from stages.foundation.errors import DataError, OcdError, TaskError
from stages.tasks.data import ArrayDataset, Split, check_like, dataset_identity, load_npz, require_tensors, split_rows

X, Y = np.arange(12.0).reshape(6, 2), np.arange(6) % 3
WRITE = 'write one with numpy.savez("train.npz", x=x, y=y)'


@pytest.fixture
def path(tmp_path):
    return tmp_path / "train.npz"


def refused(path, labels=True):
    """The message of the one error that a file is refused with, without the file's path."""
    with pytest.raises(DataError) as caught:
        load_npz(path, labels=labels)
    assert caught.value.message.startswith(str(path))
    assert caught.value.hint
    return caught.value.message.removeprefix(str(path))


# Files


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (np.float64, torch.float32),
        (np.float32, torch.float32),
        (np.float16, torch.float32),
        (">f8", torch.float32),
        (np.int64, torch.int64),
        (np.int32, torch.int64),
        (np.int8, torch.int64),
        (np.bool_, torch.int64),
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


def test_missing_file(path):
    with pytest.raises(DataError) as caught:
        load_npz(path, labels=True)
    assert caught.value.message == f"{path} is missing"
    assert caught.value.hint == "ocd.toml names it under [task]; relative paths start at its folder"


def test_single_array(path):
    with path.open("wb") as file:
        np.save(file, X)
    assert refused(path) == " is not an npz file: it is a single array"


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


@pytest.mark.parametrize("content", [b"", b"x,y\n1,2\n", b"PK\x03\x04 and then nothing of the kind"])
def test_file_of_another_kind(path, content):
    path.write_bytes(content)
    assert refused(path).startswith(" is not an npz file: ")


def test_no_x_or_y(path):
    np.savez(path, x=X, labels=Y)
    assert refused(path) == " has no array y; it has x, labels"
    np.savez(path, inputs=X, labels=Y)
    assert refused(path) == " has no array x or y; it has inputs, labels"
    assert refused(path, labels=False) == " has no array x; it has inputs, labels"
    np.savez(path)
    assert refused(path) == " has no array x or y; it has none"
    with pytest.raises(DataError) as caught:
        load_npz(path, labels=True)
    assert caught.value.hint == WRITE


def test_objects_that_would_need_pickle(path):
    ragged = np.empty(6, dtype=object)
    ragged[:] = [[0] * i for i in range(6)]
    np.savez(path, x=ragged, y=Y)
    assert refused(path) == ": x is ragged or holds Python objects, which would need pickle"
    np.savez(path, x=X, y=np.array([{}] * 6))
    assert refused(path) == ": y is ragged or holds Python objects, which would need pickle"


@pytest.mark.parametrize("values", [np.array(["a"] * 6), np.zeros(6, dtype=complex), np.zeros(6, dtype="datetime64[s]")])
def test_values_that_are_no_numbers(path, values):
    np.savez(path, x=X, y=values)
    assert refused(path) == f": y has dtype {values.dtype}, expected numbers"


def test_single_number(path):
    np.savez(path, x=X, y=3)
    assert refused(path) == ": y is a single number, expected one row per sample"


def test_no_rows(path):
    np.savez(path, x=X[:0], y=Y[:0])
    assert refused(path) == " is empty: x has shape (0, 2)"


def test_lengths_that_differ(path):
    np.savez(path, x=np.zeros((1200, 2)), y=np.zeros(7))
    assert refused(path) == ": x has 1,200 rows, y has 7"


def test_pictures_as_bytes(path):
    np.savez(path, x=X.astype(np.uint8), y=Y)
    assert refused(path) == ": x is uint8, which models do not take"
    with pytest.raises(DataError, match="uint8") as caught:
        load_npz(path, labels=True)
    assert "x.astype('float32') / 255" in caught.value.hint


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


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_number_too_large_for_single_precision(path):
    np.savez(path, x=np.where(X == 8, 1e300, X), y=Y)
    assert refused(path) == ": x[4] is not finite"


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


# Batches


class Pairs:
    """A map-style dataset of given items."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


def test_batches_of_arrays_and_of_items_are_the_same():
    x, y = torch.from_numpy(X).float(), torch.from_numpy(Y)
    arrays, items = Split(ArrayDataset(x, y)), Split(Pairs([(x[i], int(y[i])) for i in range(6)]))
    for split in (arrays, items, arrays.select(slice(None))):
        found = split.batch([4, 0])
        assert found[0].tolist() == X[[4, 0]].tolist()
        assert found[1].tolist() == Y[[4, 0]].tolist()
        assert split.inputs([4, 0]).tolist() == X[[4, 0]].tolist()


def test_positions_count_inside_the_split():
    split = Split(ArrayDataset(torch.from_numpy(X), torch.from_numpy(Y)), torch.tensor([5, 3, 1]), "train")
    assert len(split) == 3
    assert split.batch([0, 2])[1].tolist() == [Y[5], Y[1]]
    assert split.select(torch.tensor([2, 0])).rows.tolist() == [1, 5]
    assert split.select(slice(1, 3)).batch([0])[1].tolist() == [Y[3]]


def test_inputs_without_labels():
    split = Split(ArrayDataset(torch.from_numpy(X), None))
    assert split.inputs([1]).tolist() == X[[1]].tolist()
    assert split.batch([1])[1] is None


def test_items_of_every_form_become_batches():
    item = ({"a": np.ones(2), "b": (torch.zeros(3), 1)}, [2.5, np.float64(1)])
    x, y = Split(Pairs([item, item])).batch([0, 1])
    assert (x["a"].dtype, tuple(x["a"].shape)) == (torch.float32, (2, 2))
    assert tuple(x["b"][0].shape) == (2, 3)
    assert (x["b"][1].dtype, x["b"][1].tolist()) == (torch.int64, [1, 1])
    assert isinstance(y, tuple)
    assert (y[0].dtype, y[0].tolist()) == (torch.float32, [2.5, 2.5])


def test_items_that_do_not_stack():
    split = Split(Pairs([(torch.zeros(2), 0), (torch.zeros(3), 0)]), name="train")
    with pytest.raises(DataError, match=re.escape("train: rows [0, 1] … do not stack into one batch")):
        split.batch([0, 1])


@pytest.mark.parametrize("item", [torch.zeros(2), (1,), (1, 2, 3), "ab"])
def test_items_that_are_no_pairs(item):
    with pytest.raises(DataError, match=re.escape(f"test[0] is {type(item).__name__}, expected a pair (x, y)")):
        Split(Pairs([item]), name="test").batch([0])


def test_item_that_raises_is_named():
    split = Split(Pairs([(1, 2), KeyError("no such picture")]), name="train")
    with pytest.raises(TaskError, match=r"train\[1\] raised KeyError: 'no such picture'"):
        split.batch([0, 1])


def test_datasets_without_length_or_rows():
    with pytest.raises(DataError, match="train has no length: generator"):
        Split((i for i in range(3)), name="train")
    with pytest.raises(DataError, match="train is empty"):
        Split([], name="train")


# Identity


def items(rows=20):
    return [({"a": torch.arange(3.0) + i, "b": torch.tensor(i)}, i % 3) for i in range(rows)]


def test_identity_is_stable():
    assert dataset_identity(Pairs(items()), "a") == dataset_identity(Pairs(items()), "another name")
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    # The same data in memory or item by item are the same data.
    assert dataset_identity(ArrayDataset(x.float(), y), "train") == dataset_identity(
        Pairs([(x[i].float(), y[i]) for i in range(6)]), "train"
    )


@pytest.mark.parametrize("row", [0, 7, 19])
def test_identity_changes_with_every_item_of_a_small_dataset(row):
    known = dataset_identity(Pairs(items()), "train")
    for change in (
        ({"a": torch.arange(3.0) + row + 1e-6 * (row + 1), "b": torch.tensor(row)}, row % 3),
        ({"a": torch.arange(3.0) + row, "b": torch.tensor(row + 1)}, row % 3),
        ({"a": torch.arange(3.0) + row, "b": torch.tensor(row)}, row % 3 + 1),
        ({"a": torch.arange(3.0) + row, "c": torch.tensor(row)}, row % 3),
        ({"a": (torch.arange(3.0) + row).view(3, 1), "b": torch.tensor(row)}, row % 3),
        ({"a": torch.arange(3.0) + row, "b": torch.tensor(row, dtype=torch.int32)}, row % 3),
        ({"a": torch.arange(3.0).double() + row, "b": torch.tensor(row)}, row % 3),
    ):
        changed = items()
        changed[row] = change
        assert dataset_identity(Pairs(changed), "train") != known


def test_identity_tells_apart_what_has_the_same_bytes():
    """Zeros are zeros in every dtype and shape, and an empty item has no bytes at all."""
    forms = [
        torch.zeros(4, dtype=torch.float32),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, 2, dtype=torch.float32),
        torch.zeros(0, dtype=torch.float32),
        torch.zeros(0, 2, dtype=torch.float32),
    ]
    found = {dataset_identity(Pairs([(form, 0)]), "train") for form in forms}
    assert len(found) == len(forms)


def test_identity_changes_with_length_and_order():
    known = dataset_identity(Pairs(items()), "train")
    assert dataset_identity(Pairs(items(21)), "train") != known
    assert dataset_identity(Pairs(items(19)), "train") != known
    assert dataset_identity(Pairs(items()[::-1]), "train") != known


class Counted(Pairs):
    def __init__(self, items):
        super().__init__(items)
        self.asked = set()

    def __getitem__(self, index):
        self.asked.add(index)
        return super().__getitem__(index)


def test_identity_of_a_large_dataset_asks_for_a_few_seeded_items():
    dataset = Counted([(torch.tensor(float(i)), 0) for i in range(5000)])
    known = dataset_identity(dataset, "train")
    asked = set(dataset.asked)
    assert 55 <= len(asked) <= 64
    assert max(asked) > 4000
    assert min(asked) < 1000
    dataset.asked.clear()
    assert dataset_identity(dataset, "train") == known
    assert dataset.asked == asked
    dataset.items[min(asked)] = (torch.tensor(-1.0), 0)
    assert dataset_identity(dataset, "train") != known


@pytest.mark.parametrize("item", [(torch.zeros(2), "seven"), (torch.zeros(2), None), (torch.zeros(2), {1, 2})])
def test_identity_of_items_that_are_no_numbers(item):
    """The first thing that looks at a dataset must say what is wrong with it."""
    with pytest.raises(OcdError, match="train"):
        dataset_identity(Pairs([item]), "train")


# Splits


@pytest.mark.parametrize(
    ("count", "fraction", "held"), [(100, 0.1, 10), (7, 0.5, 4), (2, 0.01, 1), (2, 0.99, 1), (50, 0.999, 49)]
)
def test_split_rows_cover_and_do_not_overlap(count, fraction, held):
    train, validation = split_rows(count, fraction, seed=5)
    assert len(validation) == held
    assert sorted(train.tolist() + validation.tolist()) == list(range(count))
    for rows in (train, validation):
        assert rows.tolist() == sorted(rows.tolist())


def test_split_rows_depend_on_the_seed_alone():
    first, again, other = (split_rows(100, 0.1, seed)[1] for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_rows_to_split(count):
    with pytest.raises(DataError, match=f"train has {count} sample, at least 2 are needed to hold one out"):
        split_rows(count, 0.1, 0)


# New inputs beside known ones


def test_inputs_like_the_training_set_pass():
    check_like(torch.zeros(5, 3), torch.zeros(2, 3), "new.npz")
    check_like({"a": torch.zeros(5, 3)}, {"a": torch.zeros(2, 3)}, "new.npz")


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.zeros(5, 4), "new.npz: a sample is float32 (4,), expected float32 (3,) as in the training set"),
        (torch.zeros(5, 3).long(), "new.npz: a sample is int64 (3,), expected float32 (3,) as in the training set"),
        (
            {"a": torch.zeros(5, 3), "b": torch.zeros(5)},
            "new.npz: a sample is a float32 (3,), b float32 (), expected float32 (3,) as in the training set",
        ),
    ],
)
def test_inputs_unlike_the_training_set(x, says):
    with pytest.raises(DataError) as caught:
        check_like(x, torch.zeros(2, 3), "new.npz")
    assert caught.value.message == says


def test_outputs_must_be_tensors():
    require_tensors({"a": torch.zeros(2), "b": (torch.zeros(2), torch.zeros(2))}, "the model")
    with pytest.raises(TaskError, match="the model returned NoneType, expected a tensor"):
        require_tensors({"a": torch.zeros(2), "b": None}, "the model")


def test_a_file_without_a_name_ending(tmp_path):
    """What counts is what a file holds."""
    content = io.BytesIO()
    np.savez(content, x=X, y=Y)
    path = tmp_path / "data"
    path.write_bytes(content.getvalue())
    assert len(load_npz(path, labels=True)) == 6
