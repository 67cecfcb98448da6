"""The delta store: chunks that Zarr reads back, and batches in a shuffled order."""

import hashlib
import threading

import numpy as np
import pytest
import zarr
from processes import wait_until

from stages.foundation.errors import ArtifactError
from stages.store.chunks import encode, write
from stages.store.delta_store import ArraySpec, DeltaStore, create_array, result_specs
from stages.store.reader import StoreReader

ROWS, SAMPLES = 7, 31
SHAPE = (3, 5)


def values(spec, count, seed=0):
    """Rows of an array."""
    draw = np.random.default_rng(seed)
    if spec.dtype == "bool":
        return draw.random((count, *spec.row_shape)) < 0.5
    return (draw.normal(size=(count, *spec.row_shape)) * 1000).astype(spec.dtype)


@pytest.fixture
def make_store(tmp_path):
    """Makes a store as collect would, and gives its reader and its arrays."""

    def make(samples=SAMPLES, rows=ROWS, factored=False):
        specs = result_specs(SHAPE, factored=factored) | {"keys": ArraySpec("float32", (4,))}
        store = DeltaStore(tmp_path / "collect", specs, samples, rows, "fingerprint")
        store.create()
        arrays = {name: values(spec, samples, number) for number, (name, spec) in enumerate(specs.items())}
        arrays["sample_index"] = np.arange(samples)
        for block in range(store.blocks):
            span = store.block_range(block)
            store.write_block(block, {name: value[span.start : span.stop] for name, value in arrays.items()})
        return StoreReader(store.folder, store.describe()), arrays

    return make


# Chunks


def chunk_of(folder, block, row_shape):
    return folder / "a" / ".".join(["c", str(block), *["0"] * len(row_shape)])


@pytest.mark.parametrize("count", [1, ROWS - 1, ROWS])
@pytest.mark.parametrize("row_shape", [(), (4,), (3, 5)])
@pytest.mark.parametrize("dtype", ["float32", "bool", "int32", "int64"])
def test_zarr_reads_back_what_is_written(tmp_path, dtype, row_shape, count):
    """Whole blocks, and last ones of fewer rows."""
    spec = ArraySpec(dtype, row_shape)
    wanted = values(spec, ROWS + count)
    if dtype == "float32":
        wanted.flat[:4] = [-0.0, np.inf, -np.inf, np.nan]
    array = create_array(zarr.open_group(tmp_path, mode="a", zarr_format=3), "a", spec, ROWS + count, ROWS)
    for block, part in enumerate((wanted[:ROWS], wanted[ROWS:])):
        path = chunk_of(tmp_path, block, row_shape)
        data = b"".join(encode(part, ROWS))
        found = write(path, encode(part, ROWS))
        assert (found.bytes, found.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert path.read_bytes() == data
    np.testing.assert_array_equal(array[:], wanted)
    # Zarr's own bytes are the same: a whole block written by it is this very file.
    array[:ROWS] = wanted[:ROWS]
    assert chunk_of(tmp_path, 0, row_shape).read_bytes() == b"".join(encode(wanted[:ROWS], ROWS))


def test_a_strided_view_and_other_byte_order_are_written_right(tmp_path):
    spec = ArraySpec("float32", (5, 3))
    wanted = values(spec, ROWS)
    array = create_array(zarr.open_group(tmp_path, mode="a", zarr_format=3), "a", spec, ROWS, ROWS)
    for given in (np.asfortranarray(wanted), wanted.astype(">f4")):
        write(tmp_path / "a" / "c.0.0.0", encode(given, ROWS))
        np.testing.assert_array_equal(array[:], wanted)


def test_a_disk_that_takes_only_half_of_a_chunk_is_full(small_disk):
    """The system writes as much as there is room for, and calls that a success."""
    filler = small_disk.fill(free=64 << 10)
    with pytest.raises(OSError, match="No space left"):
        write(small_disk.path / "c.0", (np.random.default_rng(0).bytes(100_000), b"sum"))
    assert list(small_disk.path.iterdir()) == [filler]


def test_a_block_of_another_shape_or_dtype_is_refused(tmp_path):
    store = DeltaStore(tmp_path, {"a": ArraySpec("float32", (3,))}, 10, 4, "fingerprint")
    store.create()
    for wrong in (np.zeros((4, 3)), np.zeros((3, 3), np.float32), np.zeros((4, 2), np.float32)):
        with pytest.raises(ValueError, match=r"a is float(32|64) \(\d, \d\), expected float32 \(4, 3\)"):
            store.write_block(0, {"a": wrong})
    assert store.pending() == [0, 1, 2]


# Reading


def test_read(make_store):
    reader, arrays = make_store()
    assert len(reader) == SAMPLES
    for name, wanted in arrays.items():
        np.testing.assert_array_equal(reader.read(name), wanted)
        for span in [(0, 1), (6, 8), (14, 14 + ROWS), (SAMPLES - 1, SAMPLES)]:
            np.testing.assert_array_equal(reader.read(name, *span), wanted[slice(*span)])


def test_factors_are_put_together(make_store):
    reader, arrays = make_store(factored=True)
    assert reader.description.arrays["delta"].as_json() == {
        "shape": [SAMPLES, *SHAPE],
        "dtype": "float32",
        "factors": ["delta_output", "delta_input"],
    }
    wanted = np.einsum("no,ni->noi", arrays["delta_output"], arrays["delta_input"])
    for span in [(0, SAMPLES), (5, 9)]:
        np.testing.assert_array_equal(reader.read("delta", *span), wanted[slice(*span)])
    for batch in reader.shuffled(["delta"], 4, seed=0, epoch=0):
        np.testing.assert_array_equal(batch["delta"], wanted[batch["row"]])
    assert reader.nbytes(["delta"]) == SAMPLES * 15 * 4


@pytest.mark.parametrize("buffer_blocks", [1, 3, 100])
@pytest.mark.parametrize("batch_size", [1, 4, ROWS, SAMPLES, 100])
def test_an_epoch_has_every_row_once(make_store, batch_size, buffer_blocks):
    reader, arrays = make_store()
    names = ["delta", "keys", "degenerate", "sample_index"]
    batches = list(reader.shuffled(names, batch_size, seed=1, epoch=0, buffer_blocks=buffer_blocks))
    sizes = [len(batch["row"]) for batch in batches]
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
    assert 1 <= sizes[-1] <= batch_size
    rows = np.concatenate([batch["row"] for batch in batches])
    assert sorted(rows.tolist()) == list(range(SAMPLES))
    for batch in batches:
        assert set(batch) == {*names, "row"}
        for name in names:
            np.testing.assert_array_equal(batch[name], arrays[name][batch["row"]])


def order_of(reader, seed, epoch, **named):
    return np.concatenate([batch["row"] for batch in reader.shuffled([], 4, seed=seed, epoch=epoch, **named)]).tolist()


def test_the_order_is_of_seed_and_epoch(make_store):
    reader, _ = make_store()
    first = order_of(reader, 1, 0)
    assert first == order_of(reader, 1, 0)
    assert len({tuple(order_of(reader, *key)) for key in [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]}) == 5
    assert first != list(range(SAMPLES))


def test_the_order_mixes_blocks_of_a_buffer_and_no_others(make_store):
    reader, _ = make_store(samples=60, rows=6)
    blocks = np.array(order_of(reader, 0, 0, buffer_blocks=5)) // 6
    assert len(set(blocks[:30])) == len(set(blocks[30:])) == 5
    # Were its blocks one after another, ten changes of block would be too many.
    assert (np.diff(blocks[:30]) != 0).sum() > 10
    # One buffer for everything is a plain permutation: every place of the epoch is reached by every part of the store.
    places = np.array([order_of(reader, 0, epoch, buffer_blocks=10) for epoch in range(200)]).argsort(1)
    np.testing.assert_allclose(places.mean(0), 29.5, atol=5)


@pytest.mark.parametrize("buffer_blocks", [1, 2, 100])
def test_only_usable_rows_are_drawn(make_store, buffer_blocks):
    reader, arrays = make_store()
    usable = np.random.default_rng(3).random(SAMPLES) < 0.4
    usable[ROWS : 3 * ROWS] = False  # whole blocks, too
    batches = list(reader.shuffled(["keys"], 4, seed=0, epoch=0, buffer_blocks=buffer_blocks, usable=usable))
    rows = np.concatenate([batch["row"] for batch in batches])
    assert sorted(rows.tolist()) == np.flatnonzero(usable).tolist()
    assert all(len(batch["row"]) == 4 for batch in batches[:-1])
    np.testing.assert_array_equal(np.concatenate([batch["keys"] for batch in batches]), arrays["keys"][rows])
    assert list(reader.shuffled(["keys"], 4, seed=0, epoch=0, usable=np.zeros(SAMPLES, bool))) == []


def read_all(reader, name):
    return {"at once": lambda: reader.read(name), "shuffled": lambda: list(reader.shuffled([name], 4, seed=0, epoch=0))}


@pytest.mark.parametrize("how", ["at once", "shuffled"])
@pytest.mark.parametrize("name", ["delta", "degenerate", "keys"])
def test_a_missing_chunk_is_refused(make_store, name, how):
    """Zarr would give its fill value: NaN, or rows that are not degenerate."""
    reader, _ = make_store()
    chunk = next((reader.path / name).glob("c.2*"))
    chunk.unlink()
    with pytest.raises(ArtifactError, match="is missing") as caught:
        read_all(reader, name)[how]()
    assert str(chunk) in caught.value.message
    assert caught.value.hint == "ocd verify names the blocks; ocd collect then redoes them"
    reader.read(name, 0, 2 * ROWS)  # the others are there


@pytest.mark.parametrize("how", ["at once", "shuffled"])
def test_a_damaged_chunk_is_refused(make_store, how):
    reader, _ = make_store()
    path = reader.path / "keys" / "c.1.0"
    for damaged in (path.read_bytes()[:-1], path.read_bytes()[:-3] + b"abc", b""):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"keys is damaged"):
            read_all(reader, "keys")[how]()


@pytest.mark.parametrize(("was", "now"), [('"separator": "."', '"separator": "/"'), ('"name": "default"', '"name": "v2"')])
def test_other_names_for_chunks_are_refused(make_store, was, now):
    """One flipped bit makes "/" of "."; Zarr then finds no chunk at all, and gives its fill value for every row."""
    reader, _ = make_store()
    path = reader.path / "degenerate" / "zarr.json"
    assert was in path.read_text()
    path.write_text(path.read_text().replace(was, now))
    with pytest.raises(ArtifactError, match="degenerate"):
        StoreReader(reader.path.parent, reader.description).read("degenerate")


def test_an_epoch_left_early_stops_its_thread(make_store):
    reader, _ = make_store()
    before = threading.active_count()
    for _ in reader.shuffled(["keys"], 4, seed=0, epoch=0, buffer_blocks=1):
        break
    wait_until(lambda: threading.active_count() <= before)
