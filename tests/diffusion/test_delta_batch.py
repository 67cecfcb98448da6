"""Rows to learn from: which deltas are usable, and which of them are held out."""

import pytest
import torch

from stages.diffusion.delta_batch import MOST_HELD_OUT, usable_split
from stages.foundation.errors import ComputeError


def test_held_out_rows():
    degenerate = torch.zeros(300, dtype=torch.bool)
    degenerate[::7] = True
    rho = torch.ones(300)
    rho[5] = 0
    train, held_out = usable_split(degenerate, rho, torch.arange(len(rho)), 0.1, seed=3)
    usable = {i for i in range(300) if i % 7 and i != 5}
    assert set(train.tolist()) | set(held_out.tolist()) == usable
    assert len(train) + len(held_out) == len(usable)
    assert len(held_out) == round(0.1 * len(usable))
    for rows in (train, held_out):
        assert rows.tolist() == sorted(rows.tolist())
    again = usable_split(degenerate, rho, torch.arange(len(rho)), 0.1, seed=3)
    assert torch.equal(again[1], held_out)
    assert not torch.equal(usable_split(degenerate, rho, torch.arange(len(rho)), 0.1, seed=4)[1], held_out)


@pytest.mark.parametrize(("count", "fraction", "held"), [(2, 0.01, 1), (2, 0.99, 1), (20_000, 0.5, MOST_HELD_OUT)])
def test_held_out_rows_at_the_bounds(count, fraction, held):
    train, held_out = usable_split(
        torch.zeros(count, dtype=torch.bool), torch.ones(count), torch.arange(count), fraction, seed=0
    )
    assert (len(train), len(held_out)) == (count - held, held)


def test_too_few_rows_are_usable():
    with pytest.raises(ComputeError, match=r"of 1,000 deltas 1 are usable; the others are degenerate"):
        usable_split(torch.arange(1000) > 0, torch.ones(1000), torch.arange(1000), 0.1, seed=0)


@pytest.mark.parametrize("repeats", [2, 5])
def test_rows_of_one_sample_are_held_out_together(repeats):
    numbers = torch.randperm(40, generator=torch.Generator().manual_seed(1)).repeat_interleave(repeats)
    degenerate = torch.zeros(len(numbers), dtype=torch.bool)
    degenerate[::3] = True
    train, held_out = usable_split(degenerate, torch.ones(len(numbers)), numbers, 0.1, seed=0)
    assert not set(numbers[train].tolist()) & set(numbers[held_out].tolist())
    assert len(numbers[held_out].unique()) == 4
    assert sorted([*train.tolist(), *held_out.tolist()]) == torch.nonzero(~degenerate).squeeze(1).tolist()


def test_one_sample_cannot_be_held_out_of_itself():
    with pytest.raises(ComputeError, match="only one sample has usable deltas, at least 2 are needed to hold one out"):
        usable_split(torch.zeros(4, dtype=torch.bool), torch.ones(4), torch.zeros(4), 0.1, seed=0)
