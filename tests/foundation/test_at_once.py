"""Rows at once: halved where memory runs out, until nothing is left to halve."""

import weakref

import pytest
import torch

from stages.foundation.errors import ComputeError, DataError
from stages.foundation.memory import AtOnce, on_its_way, ran_out


def wrapped():
    """As the user's code has it told."""
    try:
        raise torch.OutOfMemoryError("no room")
    except torch.OutOfMemoryError as error:
        made = ComputeError("the model's forward pass: out of memory")
        made.__cause__ = error
        return made


def with_room_for(most, error=torch.OutOfMemoryError):
    def work(part):
        if len(part) > most:
            raise error("no room") if isinstance(error, type) else error
        return list(part)

    return work


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, wrapped()])
def test_halved_for_good(error):
    told = []
    at_once = AtOnce(10, tell=told.append)
    parts = list(at_once.each(range(3, 20), with_room_for(3, error)))
    assert [row for part in parts for row in part] == list(range(3, 20))
    assert (told, at_once.rows) == ([5, 3], 3)
    assert [len(part) for part in at_once.each(range(7), list)] == [3, 3, 1]


def test_halved_are_those_that_there_are():
    at_once = AtOnce(1 << 30)
    assert [len(part) for part in at_once.each(range(12), with_room_for(6))] == [6, 6]
    assert at_once.rows == 6


def test_never_fewer_than_the_least():
    at_once = AtOnce(5, least=2)
    with pytest.raises(torch.OutOfMemoryError):
        at_once.whole(lambda rows: with_room_for(1)(range(rows)))
    assert at_once.rows == 2


def test_other_errors_are_no_reason():
    at_once = AtOnce(8)
    with pytest.raises(DataError):
        at_once.whole(lambda rows: with_room_for(1, DataError("a bad label"))(range(rows)))
    assert at_once.rows == 8
    assert not ran_out(ValueError())
    assert not ran_out(None)


def test_nothing_of_the_failure_is_kept():
    """What the failed attempt held is free before the next one begins."""
    alive = []

    def work(rows):
        if rows > 1:
            held = torch.nn.Linear(1, 1)
            alive.append(weakref.ref(held))
            raise torch.OutOfMemoryError("no room")
        return [one() for one in alive]

    assert AtOnce(4).whole(work) == [None, None]


def test_on_a_cpu_a_copy_is_there_at_once():
    tree = {"a": torch.ones(2), "b": (torch.zeros(1), None)}
    assert on_its_way(tree, torch.device("cpu"))()["a"].equal(tree["a"])
