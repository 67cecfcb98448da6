"""Trees of tensors keep their class, whatever that is."""

import dataclasses
from collections import OrderedDict, defaultdict, namedtuple

import pytest
import torch

from stages.foundation.errors import TaskError
from stages.foundation.trees import as_tree, batch_size, concatenate, leaves, take, tree_map

Pair = namedtuple("Pair", ["a", "b"])


@dataclasses.dataclass(frozen=True)
class Frozen:
    a: torch.Tensor
    b: torch.Tensor | None = None


@dataclasses.dataclass
class Slots:
    __slots__ = ("a", "b")
    a: torch.Tensor
    b: torch.Tensor


class Attributes(OrderedDict):
    """Entries are attributes, too; made by keywords alone."""

    def __init__(self, **values):
        super().__init__(values)
        self.__dict__.update(values, kept=3)


def ones(size=2):
    return torch.ones(size, 3)


TREES = {
    "tensor": ones(),
    "dict": {"a": ones(), "b": None},
    "list": [ones(), ones()],
    "nested": {"a": (ones(), [ones()])},
    "namedtuple": Pair(ones(), ones()),
    "of torch": ones().max(1),
    "frozen dataclass": Frozen(ones()),
    "dataclass with slots": Slots(ones(), ones()),
    "attributes": Attributes(a=ones(), b=ones()),
    "default dict": defaultdict(list, a=ones()),
}


@pytest.mark.parametrize("kind", TREES)
def test_trees_keep_their_class(kind):
    tree = TREES[kind]
    doubled = tree_map(lambda leaf: leaf * 2, tree)
    assert type(doubled) is type(tree)
    assert leaves(doubled).keys() == leaves(tree).keys()
    for path, leaf in leaves(doubled).items():
        assert torch.equal(leaf, leaves(tree)[path] * 2)
    both = concatenate([tree, doubled])
    assert (batch_size(both), type(both)) == (4, type(tree))
    assert torch.equal(next(iter(leaves(take(both, slice(2, 4))).values())), next(iter(leaves(doubled).values())))
    again = as_tree(tree, list(leaves(doubled).values()))
    assert all(torch.equal(leaf, leaves(again)[path]) for path, leaf in leaves(doubled).items())


def test_entries_that_are_attributes_stay_in_step():
    found = tree_map(lambda leaf: leaf * 2, TREES["attributes"])
    assert found.a is found["a"]
    assert float(found.a[0, 0]) == 2
    assert found.kept == 3
    assert float(TREES["attributes"].a[0, 0]) == 1


def test_a_class_that_cannot_be_copied_is_named():
    class Closed(dict):
        def __copy__(self):
            raise RuntimeError("no copies")

    with pytest.raises(TaskError, match="a Closed cannot be copied: RuntimeError: no copies"):
        tree_map(torch.clone, Closed(a=ones()))
