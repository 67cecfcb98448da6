"""Data from arrays or item by item: batches, identity, splits, and new inputs beside known ones."""

import re

import numpy as np
import pytest
import torch
from refusals import refusal

from stages.foundation.errors import DataError, OcdError, TaskError
from stages.tasks.data import ArrayDataset, Split, check_like, require_tensors, split_rows
from stages.tasks.identity import dataset_identity

X, Y = np.arange(12.0).reshape(6, 2), np.arange(6) % 3


class Pairs:
    """A map-style dataset of given items, which notes those that are asked for."""

    def __init__(self, items):
        self.items, self.asked = items, set()

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.asked.add(index)
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
    assert isinstance(y, list)
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


def test_identity_of_a_large_dataset_asks_for_a_few_seeded_items():
    dataset = Pairs([(torch.tensor(float(i)), 0) for i in range(5000)])
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
    assert refusal(DataError, check_like, x, torch.zeros(2, 3), "new.npz")[0] == says


def test_outputs_must_be_tensors():
    require_tensors({"a": torch.zeros(2), "b": (torch.zeros(2), torch.zeros(2))}, 2)
    with pytest.raises(TaskError, match="the model returned int as b, expected a tensor"):
        require_tensors({"a": torch.zeros(2), "b": 3}, 2)
