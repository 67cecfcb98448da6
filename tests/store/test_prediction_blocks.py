"""Predictions written in blocks: the file they are put together into, and how large blocks and chunks are."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.store.predictions import PredictionBlocks, chunk_rows, prediction_rows


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool"])
def test_an_answer_has_the_bytes_of_savez(tmp_path, dtype):
    arrays = {"wide": np.arange(60).reshape(10, 3, 2).astype(dtype), "flat": np.arange(10).astype(dtype)}
    predictions = PredictionBlocks(tmp_path, samples=10, rows=4, fingerprint="a", members=1, delta=None, batch=4)
    predictions.create()
    for block in range(predictions.blocks):
        span = predictions.block_range(block)
        predictions.write_block(block, {name: array[span.start : span.stop] for name, array in arrays.items()}, {})
    predictions.put_together(tmp_path / "found.npz")
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    assert (tmp_path / "found.npz").read_bytes() == stream.getvalue()


@given(samples=st.integers(1, 300_000), batch=st.integers(1, 1024), row_bytes=st.integers(1, 1 << 30))
@settings(max_examples=60)
def test_blocks_are_whole_batches(samples, batch, row_bytes):
    rows = prediction_rows(samples, batch, row_bytes)
    assert rows % batch == 0
    assert rows == batch or (rows < 4096 + batch and rows - batch < samples / 64 + 1)


@given(batch=st.integers(1, 300), row_bytes=st.integers(1, 1 << 26))
@settings(max_examples=60)
def test_no_two_batches_share_a_chunk(batch, row_bytes):
    rows = chunk_rows(batch, row_bytes)
    assert batch % rows == 0
    assert rows == 1 or rows * row_bytes <= 16 << 20
