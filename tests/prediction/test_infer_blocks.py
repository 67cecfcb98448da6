"""`ocd infer` block by block: killed, continued, divided into parts, grown; its inputs left in their file."""

import io
import json
import shutil
import signal

import numpy as np
import pytest
import reference
import torch
import zarr
from folders import Folder, blocks_of, flip, make_folder, results
from hypothesis import given, settings
from hypothesis import strategies as st
from overfitters import Custom, Tied, forward, frozen, random
from processes import counted_blocks, stopped_at, wait_until
from torch import nn

from stages.infer import open_run
from stages.per_sample.layer import find_layer
from stages.per_sample.runner import Runner
from stages.per_sample.weights import Loop, Substitution, Vmap
from stages.prediction.personalised import PersonalisedModel
from stages.store.predictions import PredictionBlocks, chunk_rows, prediction_rows
from stages.tasks.data import load_npz

BLOCKS = 12
WIP = "infer/test.wip"


@pytest.fixture(scope="module")
def answered_run(tmp_path_factory, ocd):
    """A project of the slow model with everything done, the answer in twelve blocks, with its deltas; not to be changed."""
    settings = {"select-layer": {"layer": "2.weight"}, "infer": {"batch_size": 2, "save_deltas": True}}
    folder = make_folder(tmp_path_factory.mktemp("answered") / "project", settings, code="slow")
    ocd(folder, "run", "--quiet")
    return folder


@pytest.fixture
def answered(answered_run, tmp_path):
    """A copy of it."""
    shutil.copytree(answered_run.root, tmp_path / "answered")
    return Folder(tmp_path / "answered")


@pytest.fixture
def ready(answered):
    """The same, about to infer."""
    shutil.rmtree(answered.run / "infer")
    return answered


@pytest.fixture
def whole(answered_run, ocd):
    """Asserts that an answer is the unbroken run's, byte for byte, with nothing beside it."""

    def check(folder):
        assert results(folder, "infer/test") == results(answered_run, "infer/test")
        assert {path.name for path in (folder.run / "infer").iterdir()} == {"test"}
        one, other = (summary(found) for found in (folder, answered_run))
        assert one == other
        ocd(folder, "verify")

    return check


def summary(folder, name="test"):
    return json.loads((folder.run / "infer" / name / "manifest.json").read_text())["summary"]


def predictions(folder, name="test"):
    with np.load(folder.run / "infer" / name / "predictions.npz", allow_pickle=False) as archive:
        return dict(archive)


def status_of(ocd, folder):
    return ocd.json(folder, "status")["stages"]["infer"]


# What is predicted


def test_every_member_of_every_input_is_the_loops(answered_run):
    found = predictions(answered_run)
    deltas = zarr.open_group(answered_run.run / "infer" / "test" / "deltas.zarr", mode="r")["delta"][:]
    assert deltas.shape == (24, 2, 3, 6)
    model, x = open_run(answered_run.config), torch.from_numpy(np.load(answered_run.root / "test.npz")["x"])
    wanted = reference.predict_loop(model.model, model.layer.name, x, torch.from_numpy(deltas))
    np.testing.assert_allclose(found["member_output"], wanted.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["base_output"], model.model(x).numpy(), rtol=1e-5, atol=1e-6)
    assert list(found) == ["rho", "sample_index", "base_output", "output", "member_output"]
    assert found["sample_index"].tolist() == list(range(24))


def test_metrics_do_not_depend_on_the_blocks(answered, ocd):
    before = summary(answered)
    ocd(answered, "infer", "--force", "--set", "infer.batch_size=24")
    for row, figures in summary(answered)["metrics"].items():
        assert figures == pytest.approx(before["metrics"][row], rel=1e-5)
    assert summary(answered)["rho"] == pytest.approx(before["rho"], rel=1e-5)


def enter_first(self, x):
    return self.leave(torch.tanh(self.fc(self.enter(x))))


MODELS = {
    "linear": (
        lambda: Custom(enter_first, enter=nn.Linear(3, 4), fc=nn.Linear(4, 4), leave=nn.Linear(4, 2)),
        "fc.weight",
        (3,),
    ),
    "bias": (lambda: Custom(enter_first, enter=nn.Linear(3, 4), fc=nn.Linear(4, 4), leave=nn.Linear(4, 2)), "fc.bias", (3,)),
    "convolution": (
        lambda: Custom(enter_first, enter=nn.Conv2d(2, 4, 3), fc=nn.Conv2d(4, 4, 3, groups=2), leave=nn.Conv2d(4, 2, 1)),
        "fc.weight",
        (2, 6, 6),
    ),
    "tied": (Tied, "enter.weight", (3,)),
}


@pytest.mark.parametrize("method", [None, Vmap, Loop])
@pytest.mark.parametrize("name", ["linear", "convolution", "tied"])
def test_members_of_every_method(name, method):
    torch.manual_seed(0)
    make, parameter, shape = MODELS[name]
    model, x = frozen(make()), random(5, *shape)
    layer = find_layer(model, parameter)
    runner = Runner(model, layer, forward, x[:2])
    if method is not None:
        runner.method = method(model, layer, forward)
    deltas = random(5, 3, *layer.matrix_shape, seed=1)
    found = runner.members_along(runner.first_pass(x), x, deltas)(1.0)
    wanted = reference.predict_loop(model, parameter, x, deltas)
    torch.testing.assert_close(found.transpose(0, 1), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("members", [1, 7])
def test_what_comes_before_the_layer_is_computed_once(answered_run, members):
    """Whatever the ensemble: the base, the conditioning and all members come from one pass through it."""
    model, calls = open_run(answered_run.config), []
    assert isinstance(model.runner.method, Substitution)
    before, after = model.model[0], model.model[1]
    for module in (before, after):
        inner = module.forward
        module.forward = lambda x, inner=inner, module=module: calls.append(module) or inner(x)
    model.predict(np.load(answered_run.root / "test.npz")["x"], members)
    assert calls == [before, after]


# Killed and continued


@pytest.mark.parametrize("kept", [3, 9])
def test_killed_and_continued(ready, start, ocd, whole, kept):
    dead = start(ready, "infer", delay=0.01)
    wait_until(lambda: len(blocks_of(ready, WIP)) >= kept)
    dead.kill()
    dead.wait(-signal.SIGKILL)
    there = {path.name: path.stat().st_mtime_ns for path in blocks_of(ready, WIP)}
    assert kept <= len(there) < BLOCKS
    entry = status_of(ocd, ready)
    assert entry["state"] == "partial"
    assert entry["progress"] == {"done": len(there), "total": BLOCKS, "unit": "blocks"}
    with counted_blocks(PredictionBlocks) as written:
        result = ocd(ready, "infer", "--set", "infer.batch_size=5")
    # The batch it was begun with is kept, so that the bits are.
    assert sorted(written) == list(range(len(there), BLOCKS))
    assert f"continues: {2 * len(there)} of 24 inputs are there" in result.stderr
    whole(ready)


def test_terminated(ready, start, ocd, whole):
    process = start(ready, "infer", "--quiet", delay=0.02)
    wait_until(lambda: blocks_of(ready, WIP))
    process.kill(signal.SIGTERM)
    assert process.wait(4).stderr == (
        "error: infer was interrupted; what is finished is kept\n  to continue, run the same command again\n"
    )
    assert blocks_of(ready, WIP)
    ocd(ready, "infer")
    whole(ready)


def test_killed_while_it_is_put_together(ready, ocd, whole, monkeypatch):
    def stop(self, path):
        path.with_name("predictions.npz.1-2.tmp").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PredictionBlocks, "put_together", stop)
        ocd(ready, "infer", code=4)
    with counted_blocks(PredictionBlocks) as written:
        ocd(ready, "infer")
    assert written == []
    whole(ready)


def test_killed_between_manifest_and_exchange(answered, ocd, whole):
    wip = answered.run / "infer" / "test.wip"
    (answered.run / "infer" / "test").rename(wip)
    (wip / "blocks").mkdir()
    (wip / "blocks" / "000000.json").write_text("{}")
    with counted_blocks(PredictionBlocks) as written:
        ocd(answered, "infer")
    assert written == []
    whole(answered)


@pytest.mark.parametrize("harm", [flip, lambda path, **_: path.unlink()], ids=["changed", "gone"])
@pytest.mark.parametrize("name", ["blocks/000001.npz", "deltas.zarr/delta/c.1.0.0.0"])
def test_a_damaged_block_is_redone(ready, ocd, whole, name, harm):
    with stopped_at(4, kind=PredictionBlocks):
        ocd(ready, "infer", code=4)
    harm(ready.run / WIP / name, keep_time=True)
    problems = ocd.json(ready, "verify", code=3)["stages"][WIP]["problems"]
    assert any("000001" in text for text in problems)
    with counted_blocks(PredictionBlocks) as written:
        ocd(ready, "infer")
    assert sorted(written) == [1, *range(4, BLOCKS)]
    whole(ready)


def test_other_settings_discard_what_was_begun(ready, ocd):
    with stopped_at(4, kind=PredictionBlocks):
        ocd(ready, "infer", code=4)
    with counted_blocks(PredictionBlocks) as written:
        ocd(ready, "infer", "--strength", 0.5)
    assert written == list(range(BLOCKS))


# Parts


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_one_part_after_another(ready, ocd, whole, order):
    for place, number in enumerate(order, 1):
        result = ocd(ready, "infer", "--part", f"{number}/3")
        if place < 3:
            says = f"infer: part {number}/3 is done; {4 * place} of 12 blocks are there, the others are other parts' work\n"
            assert result.stdout == says
            assert not (ready.run / "infer" / "test").exists()
    whole(ready)
    assert "infer: up to date" in ocd(ready, "infer", "--part", "2/3").stdout


def test_all_parts_at_once(ready, start, ocd, whole):
    parts = [start(ready, "infer", "--part", f"{number}/3", delay=0.05) for number in (1, 2, 3)]
    named = [f" (part {number}/3)" for number in (1, 2, 3)]
    wait_until(lambda: [text[-11:] for text in status_of(ocd, ready).get("in_use_by", [])] == named)
    for part in parts:
        part.wait()
    whole(ready)


def test_parts_take_up_what_a_plain_command_left(ready, ocd, whole):
    with stopped_at(4, kind=PredictionBlocks):
        ocd(ready, "infer", code=4)
    with counted_blocks(PredictionBlocks) as written:
        for number in (1, 2):
            ocd(ready, "infer", "--part", f"{number}/2")
    assert sorted(written) == list(range(4, BLOCKS))
    whole(ready)


def test_parts_redo_a_stale_answer(answered, ocd):
    for number in (2, 1):
        ocd(answered, "infer", "--part", f"{number}/2", "--strength", 0)
    found = predictions(answered)
    np.testing.assert_array_equal(found["member_output"][:, 0], found["base_output"])


def test_what_a_running_part_keeps_off(ready, start, ocd, whole):
    # Slow enough to be at work until the last of the others has been turned away, also on a busy machine.
    part = start(ready, "infer", "--part", "1/2", delay=0.1)
    wait_until(lambda: (ready.run / WIP / "blocks").exists())
    for words, says in (
        (["--part", "1/2"], "infer/test --part 1/2 is in use by process {pid} on "),
        (["--part", "1/3"], "infer/test --part 1/3: others have divided the work in another way: process {pid} on "),
        (
            ["--part", "2/2", "--strength", "0.5"],
            "infer/test was begun with other settings, and is in use by process {pid} on ",
        ),
        ([], "infer/test is in use by process {pid} on "),
    ):
        result = ocd(ready, "infer", "--quiet", *words, code=4)
        assert says.format(pid=part.pid) in result.stderr
    # Another answer is no business of it.
    ocd(ready, "infer", "--split", "validation")
    part.wait()
    shutil.rmtree(ready.run / "infer" / "validation")
    ocd(ready, "infer", "--part", "2/2")
    whole(ready)


def test_more_parts_than_blocks(ready, ocd):
    result = ocd(ready, "infer", "--quiet", "--part", "1/13", code=2)
    assert result.stderr == (
        "error: --part 1/13: more parts than blocks, of which there are 12\n"
        "  use fewer parts, or smaller batches, of which blocks are made, with --set infer.batch_size=N\n"
    )
    ocd(ready, "infer", "--dry-run", "--part", "13/13", code=2)
    assert not (ready.run / "infer").exists()


@pytest.mark.parametrize("text", ["0/2", "3/2", "x"])
def test_no_part(ready, ocd, text):
    assert f"--part {text}: expected i/n" in ocd(ready, "infer", "--part", text, code=2).stderr
    assert not (ready.run / "infer").exists()


# Larger ensembles

BARE = ("--set", "infer.save_deltas=false")


@pytest.fixture
def drawn(monkeypatch):
    """Which members were sampled, a batch each."""
    predict, found = PersonalisedModel.predict, []

    def counted(self, x, ensemble=None, *, rows=None, first_member=0):
        found.append(range(first_member, first_member + ensemble))
        return predict(self, x, ensemble, rows=rows, first_member=first_member)

    monkeypatch.setattr(PersonalisedModel, "predict", counted)
    return found


@pytest.mark.parametrize("words", [[[]], [["--part", "2/2"], ["--part", "1/2"]]], ids=["whole", "parts"])
def test_a_larger_ensemble(ready, ocd, drawn, words):
    ocd(ready, "infer", *BARE)
    before = predictions(ready)
    drawn.clear()
    for more in words:
        ocd(ready, "infer", *BARE, "--ensemble", 5, *more)
    assert set(drawn) == {range(2, 5)}
    grown = predictions(ready)
    np.testing.assert_array_equal(grown["member_output"][:, :2], before["member_output"])
    assert sorted(path.name for path in (ready.run / "infer" / "test").iterdir()) == [
        "log.txt",
        "manifest.json",
        "predictions.npz",
    ]
    ocd(ready, "infer", *BARE, "--ensemble", 5, "--force")
    for name, value in predictions(ready).items():
        np.testing.assert_allclose(grown[name], value, rtol=1e-5, atol=1e-6)


def test_a_larger_ensemble_that_was_interrupted(ready, ocd, drawn):
    ocd(ready, "infer", *BARE)
    with stopped_at(4, kind=PredictionBlocks):
        ocd(ready, "infer", *BARE, "--ensemble", 3, code=4)
    drawn.clear()
    ocd(ready, "infer", *BARE, "--ensemble", 3)
    assert drawn == [range(2, 3)] * (BLOCKS - 4)
    found = predictions(ready)
    ocd(ready, "infer", *BARE, "--ensemble", 3, "--force")
    np.testing.assert_allclose(found["member_output"], predictions(ready)["member_output"], rtol=1e-5, atol=1e-6)


def test_blocks_of_fewer_members_do_not_count(ready, ocd):
    with stopped_at(4, kind=PredictionBlocks):
        ocd(ready, "infer", code=4)
    ocd(ready, "infer", "--ensemble", 4, "--set", "infer.batch_size=5")
    assert predictions(ready)["member_output"].shape == (24, 4, 3)
    deltas = zarr.open_group(ready.run / "infer" / "test" / "deltas.zarr", mode="r")["delta"]
    assert deltas.shape == (24, 4, 3, 6)
    assert np.isfinite(deltas[:]).all()


# Inputs left in their file


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_npy_file_gives_the_same_bytes(ready, ocd, dtype):
    with np.load(ready.root / "test.npz") as data:
        x = data["x"].astype(dtype)
    np.savez(ready.root / "one.npz", x=x)
    np.save(ready.root / "other.npy", x)
    found = []
    for file in ("one.npz", "other.npy"):
        ocd(ready, "infer", "--input", ready.root / file)
        found.append((ready.run / "infer" / file[:-4] / "predictions.npz").read_bytes())
    assert found[0] == found[1]
    assert summary(ready, "other")["metrics"] is None


@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_an_npy_file_is_left_in_its_place(tmp_path, dtype):
    x = np.arange(200).reshape(50, 4).astype(dtype)
    np.save(tmp_path / "new.npy", x)
    loaded = load_npz(tmp_path / "new.npy", labels=False)
    found = np.load(tmp_path / "new.npy", mmap_mode="r+")
    found[3] = 7
    found.flush()
    assert loaded.x[3].tolist() == [7] * 4
    loaded.x[3] = 8
    assert found[3].tolist() == [7] * 4


# Files and sizes


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
@settings(max_examples=60, deadline=None, derandomize=True)
def test_blocks_are_whole_batches(samples, batch, row_bytes):
    rows = prediction_rows(samples, batch, row_bytes)
    assert rows % batch == 0
    assert rows == batch or (rows < 4096 + batch and rows - batch < samples / 64 + 1)


@given(batch=st.integers(1, 300), row_bytes=st.integers(1, 1 << 26))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_two_batches_share_a_chunk(batch, row_bytes):
    rows = chunk_rows(batch, row_bytes)
    assert batch % rows == 0
    assert rows == 1 or rows * row_bytes <= 16 << 20
