"""The quick search against the one over all distances."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from overfitters import random

from stages.tasks import neighbours
from stages.tasks.neighbours import SearchIndex

F32 = {"dtype": torch.float32}


def slowly(asked, known, k, excluded):
    """Every distance, pairs that do not count last."""
    distance = torch.cdist(asked.double(), known.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distance[excluded[:, 0], excluded[:, 1]] = torch.inf
    distance, row = distance.sort(dim=1, stable=True)
    return distance[:, :k], row[:, :k]


@given(
    queries=st.integers(1, 20),
    candidates=st.integers(1, 90),
    width=st.integers(1, 6),
    k=st.integers(1, 12),
    shift=st.sampled_from([0.0, 1e4]),
    pairs=st.integers(0, 30),
)
def test_it_finds_what_all_distances_find(queries, candidates, width, k, shift, pairs):
    """Also where all points share a shift, beside which single precision hardly sees their differences."""
    asked, known = random(queries, width, **F32) + shift, random(candidates, width, seed=1, **F32) + shift
    draw = torch.Generator().manual_seed(pairs)
    excluded = torch.stack([torch.randint(n, (pairs,), generator=draw) for n in (queries, candidates)], dim=1)
    found = SearchIndex(known).nearest(asked, k, excluded)
    distance, row = slowly(asked, known, k, excluded)
    torch.testing.assert_close(found.distance.double(), distance, rtol=1e-5, atol=1e-5 * (1 + shift / 1e4))
    counted = torch.isfinite(distance)
    # Equal distances come in any order, and so do pairs that do not count.
    apart = (distance.diff(dim=1, append=torch.full((queries, 1), torch.inf, dtype=torch.float64)).abs() > 1e-4) & counted
    apart[:, 1:] &= (distance.diff(dim=1).abs() > 1e-4) & counted[:, 1:]
    assert torch.equal(found.row[apart], row[apart])


def test_blocks_and_parts_make_no_difference(monkeypatch):
    asked, known = random(40, 5, **F32), random(300, 5, seed=1, **F32)
    pairs = torch.stack([torch.arange(40), torch.arange(40) * 7], dim=1)
    wanted = SearchIndex(known).nearest(asked, 4, pairs)
    monkeypatch.setattr(neighbours, "QUICK_QUERIES", 7)
    monkeypatch.setattr(neighbours, "QUICK_CANDIDATES", 64)
    found = SearchIndex(known).nearest(asked, 4, pairs)
    assert torch.equal(found.row, wanted.row)
    assert torch.equal(found.distance, wanted.distance)


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_what_rounding_could_hide_is_looked_for_exactly(monkeypatch, spread):
    """Points so close, beside how far they are from the centre, that products in single precision cannot rank them; a point far
    off is none of them."""
    known = torch.ones(1000, 8) * (-1) ** torch.arange(1000).view(-1, 1) + spread * random(1000, 8, seed=1, **F32)
    known[0] = 500
    asked, sought = torch.ones(3, 8), []
    exactly = neighbours._exactly
    monkeypatch.setattr(neighbours, "_exactly", lambda *args: sought.append(1) or exactly(*args))
    found = SearchIndex(known).nearest(asked, 3)
    distance, row = slowly(asked, known, 3, torch.empty(0, 2, dtype=torch.long))
    assert torch.equal(found.row, row)
    torch.testing.assert_close(found.distance.double(), distance, rtol=1e-5, atol=0)
    assert bool(sought) == (spread < 1)
