"""Nearest training samples against brute force over all distances, however the candidates come in."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from overfitters import random

from stages.tasks.data import ArrayDataset, Split
from stages.tasks.neighbours import CANDIDATES_AT_ONCE, QUERIES_AT_ONCE, Neighbours, flat_inputs, input_blocks, nearest
from stages.tasks.protocol import Task

CPU = torch.device("cpu")


def blocks_of(candidates, size):
    return [(start, candidates[start : start + size]) for start in range(0, len(candidates), size)]


def brute_force(queries, candidates, k):
    """Every distance, each as the norm of a difference, sorted."""
    distance, row = torch.cdist(queries, candidates, compute_mode="donot_use_mm_for_euclid_dist").sort(dim=1, stable=True)
    return distance[:, :k], row[:, :k]


@given(
    queries=st.integers(1, 9),
    candidates=st.integers(1, 30),
    width=st.integers(1, 6),
    k=st.integers(1, 35),
    size=st.integers(1, 31),
    shift=st.sampled_from([0.0, 100.0]),
)
def test_nearest_equals_brute_force(queries, candidates, width, k, size, shift):
    """Over blocks of every size, and with k above the number of candidates."""
    asked, known = random(queries, width) + shift, random(candidates, width, seed=1) + shift
    found = nearest(asked, blocks_of(known, size), k)
    distance, row = brute_force(asked, known, k)
    assert found.row.shape == (queries, min(k, candidates))
    # Squares of numbers below 100 differ by rounding of 1e-12, of which the root near zero is 1e-6.
    torch.testing.assert_close(found.distance, distance, rtol=0, atol=1e-6)
    assert torch.equal(found.row, row)


def test_nearest_in_single_precision():
    asked, known = random(50, 20, dtype=torch.float32) + 1e3, random(500, 20, seed=1, dtype=torch.float32) + 1e3
    found = nearest(asked, blocks_of(known, 128), 3)
    distance, _ = brute_force(asked.double(), known.double(), 3)
    assert found.distance.dtype == torch.float32
    # What is common to all, the thousand, is taken off before squares of 20 numbers near 1 are.
    torch.testing.assert_close(found.distance.double(), distance, rtol=1e-5, atol=0)


def test_more_queries_than_go_at_once():
    asked, known = random(QUERIES_AT_ONCE + 23, 4), random(40, 4, seed=1)
    parts = [nearest(part, [(0, known)], 5) for part in asked.split(500)]
    wanted = Neighbours(torch.cat([part.distance for part in parts]), torch.cat([part.row for part in parts]))
    found = nearest(asked, [(0, known)], 5)
    assert torch.equal(found.row, wanted.row)
    # Products of other shapes may be summed in another order.
    torch.testing.assert_close(found.distance, wanted.distance, rtol=1e-12, atol=1e-12)


def test_a_sample_is_its_own_neighbour():
    known = random(30, 5)
    found = nearest(known, blocks_of(known, 7), 1)
    assert torch.equal(found.row[:, 0], torch.arange(30))
    # The root of a rounded zero, 1e-15.
    assert float(found.distance.max()) < 1e-6


def test_the_numbers_of_candidates_are_those_their_blocks_say():
    known = random(10, 3, seed=1)
    found = nearest(random(4, 3), [(100, known[:4]), (7, known[4:])], 2)
    _, row = brute_force(random(4, 3), known, 2)
    assert torch.equal(found.row, torch.where(row < 4, row + 100, row + 3))


def test_progress_is_of_the_candidates_seen():
    on_progress = []
    nearest(random(2, 3), blocks_of(random(10, 3), 4), 1, on_progress.append)
    assert on_progress == [4, 8, 10]


def test_distances_are_roots_of_nothing_negative():
    known = torch.full((6, 4), 1.1)
    found = nearest(known, blocks_of(known, 4), 6)
    assert torch.isfinite(found.distance).all()
    assert (found.distance >= 0).all()


def test_spread_puts_queries_in_their_places():
    found = nearest(random(3, 2), [(0, random(8, 2, seed=1))], 2)
    spread = found.spread(torch.tensor([4, 0, 2]), 6)
    assert torch.equal(spread.row[[4, 0, 2]], found.row)
    assert torch.equal(spread.distance[[4, 0, 2]], found.distance)
    assert (spread.row[[1, 3, 5]] == -1).all()
    assert (spread.row.shape, spread.row.dtype) == ((6, 2), torch.long)


def test_spread_leaves_the_first_as_it_was():
    found = Neighbours(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long))
    found.spread(torch.tensor([1]), 3)
    assert found.row.tolist() == [[0]]


def test_flat_inputs():
    x = {"a": random(3, 2, 2), "b": random(3, seed=1)}
    found = flat_inputs(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.cat([x["a"].flatten(1), x["b"].unsqueeze(1)], dim=1).float(), rtol=0, atol=0)
    assert torch.equal(flat_inputs((x["a"], x["b"])), found)
    assert flat_inputs(random(3, 2, 5)).shape == (3, 10)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_integers_have_no_distance(dtype):
    assert flat_inputs(torch.zeros(3, 2, dtype=dtype)) is None
    assert flat_inputs({"a": random(3, 2), "b": torch.zeros(3, dtype=dtype)}) is None


@pytest.mark.parametrize("make", [lambda x: ArrayDataset(x, None), lambda x: [(row.numpy(), 0) for row in x]])
def test_blocks_are_of_the_positions_in_their_order(make):
    """Numbers count the positions that were asked for, not rows of the dataset."""
    count = 2 * CANDIDATES_AT_ONCE + 30
    x, rows = random(count, 2, 2, dtype=torch.float32), torch.arange(count - 1, -1, -1)
    positions = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: 2 * CANDIDATES_AT_ONCE + 5]
    found = list(input_blocks(Task(), Split(make(x), rows), positions, CPU))
    assert [start for start, _ in found] == [0, CANDIDATES_AT_ONCE, 2 * CANDIDATES_AT_ONCE]
    assert torch.equal(torch.cat([block for _, block in found]), x[count - 1 - positions].flatten(1))


def test_neighbours_by_blocks_of_a_split_larger_than_one_block():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(CANDIDATES_AT_ONCE + 900, 3)).astype(np.float32))
    split, positions, asked = Split(ArrayDataset(x, None)), torch.arange(0, len(x)), random(20, 3, dtype=torch.float32)
    found = nearest(asked, input_blocks(Task(), split, positions, CPU), 1)
    assert torch.equal(found.row, brute_force(asked.double(), x.double(), 1)[1])
    assert (found.row >= CANDIDATES_AT_ONCE).any()
