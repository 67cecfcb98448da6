"""The rows that trainings learn from: from memory or from the disk, in an order of the seed's alone."""

import numpy as np
import pytest
import torch
from folders import put, reader_of, results
from trainings import QUICK, rows_of, words

from stages.training.batches import NOTHING, WHOLE


@pytest.mark.parametrize("deltas", [WHOLE, NOTHING])
@pytest.mark.parametrize("step", [0, 11])
def test_rows_from_the_disk_are_those_from_memory(collected, monkeypatch, deltas, step):
    """Also where a buffer holds two of the nine blocks."""
    monkeypatch.setattr("stages.training.batches.BUFFER_BYTES", 2 * 4 * 4 * (18 if deltas == WHOLE else 9))
    memory, disk = rows_of(collected, deltas=deltas), rows_of(collected, deltas=deltas, memory=0)
    assert (memory.place, disk.place) == ("kept in memory", "read from the disk while training")
    pairs = [(memory.held_out, disk.held_out), *zip(memory.batches(step), disk.batches(step), range(12), strict=False)]
    for one, other, *_ in pairs:
        assert torch.equal(one.numbers, other.numbers)
        assert torch.equal(one.rho, other.rho)
        assert (one.deltas is None) == (other.deltas is None) == (deltas == NOTHING)
        assert deltas == NOTHING or torch.equal(one.deltas, other.deltas)
        assert all(torch.equal(value, other.fields[name]) for name, value in one.fields.items())


def test_batches_are_the_stores_rows_and_epochs_permutations(collected):
    rows, reader = rows_of(collected), reader_of(collected)
    delta, seen = reader.read("delta"), []
    for batch, _ in zip(rows.batches(0), range(rows.count), strict=False):
        assert np.array_equal(batch.deltas.numpy(), delta[batch.numbers.numpy()])
        seen += batch.numbers.tolist()
    held = set(rows.held_out.numbers.tolist())
    for epoch in range(7):
        part = seen[epoch * rows.count : (epoch + 1) * rows.count]
        assert len(set(part)) == rows.count
        assert not held & set(part)
    assert seen[: rows.count] != seen[rows.count : 2 * rows.count]


def test_a_later_step_begins_where_it_would_have_come(collected):
    rows = rows_of(collected)
    whole = [batch.numbers for batch, _ in zip(rows.batches(0), range(20), strict=False)]
    later = [batch.numbers for batch, _ in zip(rows.batches(13), range(7), strict=False)]
    assert all(torch.equal(one, other) for one, other in zip(whole[13:], later, strict=True))
    share = [batch.numbers for batch, _ in zip(rows.batches(13, slice(2, 5)), range(7), strict=False)]
    assert all(torch.equal(one[2:5], other) for one, other in zip(whole[13:], share, strict=True))


@pytest.mark.parametrize(
    ("stage", "why"),
    [("train-diffusion", "there is no memory"), ("train-diffusion", "it is said"), ("train-scale", "there is no memory")],
)
def test_a_store_that_is_not_kept_is_read_meanwhile(ocd, untrained, monkeypatch, stage, why):
    settings = words(QUICK, stage)
    ocd(untrained, stage, *settings)
    wanted = results(untrained, stage)
    if why == "it is said":
        settings += put(f"{stage}.store_memory=0")
    else:
        monkeypatch.setattr("stages.training.batches.available_memory", lambda: 0)
    said = ocd(untrained, stage, *settings, "--force").stderr
    assert ("the store is read from the disk while training" in said) == (stage == "train-diffusion")
    assert results(untrained, stage) == wanted
