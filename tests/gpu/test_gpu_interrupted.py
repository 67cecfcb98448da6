"""Memory that runs out anywhere, and work that is begun on one device and continued on the other."""

import random

import pytest
from comparing import assert_same
from processes import stopped_at, stopped_training

from stages.store.predictions import PredictionBlocks

STAGES = ("train-base", "select-layer", "collect", "train-diffusion", "train-scale", "infer", "evaluate", "probe")
DRAWS = {"probe": 1, "evaluate": 4}
PROBE = ("--quick", "--layer", "0.weight", "--samples", "8")


def words_of(stage):
    return [stage, *(PROBE if stage == "probe" else ())]


def about_to(folder, place, stage):
    """A copy in which the stage is yet to be done."""
    copy = folder.copy(place)
    return copy if stage == "probe" else copy.without(stage)


@pytest.fixture(scope="module")
def allocations(gpus, trained_on_cpu, tmp_path_factory):
    """How many a stage makes that nothing disturbs."""
    known = {}

    def count(stage):
        if stage not in known:
            folder = about_to(trained_on_cpu, tmp_path_factory.mktemp("whole") / "gpu", stage)
            known[stage] = gpus(folder, *words_of(stage)).seen["allocations"]
        return known[stage]

    return count


@pytest.mark.parametrize("stage", STAGES)
def test_memory_that_runs_out_anywhere(gpus, allocations, trained_on_cpu, tmp_path, stage):
    """Half as much at once gives the same results; or a message says so, and the same command finishes when there is room."""
    for number in sorted(random.Random(stage).sample(range(1, allocations(stage) + 1), DRAWS.get(stage, 6))):
        folder = about_to(trained_on_cpu, tmp_path / str(number), stage)
        done = gpus(folder, *words_of(stage), oom_at=(number,), code=None)
        assert done.code in (0, 1), done.shown
        if done.code == 1:
            assert "out of memory" in done.stderr, done.shown
            gpus(folder, *words_of(stage))
        if stage != "probe":
            assert_same(folder, trained_on_cpu, stage)


BEGUN = ("collect", "train-diffusion", "train-scale", "infer")


@pytest.fixture(scope="module")
def in_blocks(on_cpu):
    """Done on the CPU, in several blocks."""
    return on_cpu({"collect": {"block_samples": 8, "batch_size": 4}, "infer": {"batch_size": 3}}, "run")


def stopping(stage):
    """What interrupts a stage in the middle."""
    if stage == "collect":
        return stopped_at(3)
    return stopped_at(1, kind=PredictionBlocks) if stage == "infer" else stopped_training(13)


@pytest.mark.parametrize("stage", BEGUN)
def test_begun_on_the_cpu_and_continued_on_a_gpu(gpus, ocd, in_blocks, tmp_path, stage):
    folder = about_to(in_blocks, tmp_path / "begun", stage)
    with stopping(stage):
        ocd(folder, stage, "--device", "cpu", code=4)
    assert "continues" in gpus(folder, stage).stderr
    assert_same(folder, in_blocks, stage)


@pytest.mark.parametrize("stage", BEGUN)
def test_begun_on_a_gpu_and_continued_on_the_cpu(gpus, ocd, in_blocks, tmp_path, stage):
    whole = gpus(about_to(in_blocks, tmp_path / "whole", stage), stage)
    folder = about_to(in_blocks, tmp_path / "begun", stage)
    gpus(folder, stage, kill_at=whole.seen["allocations"] * 5 // 6, code=-9)
    assert "continues" in ocd(folder, stage, "--device", "cpu").stderr
    assert_same(folder, in_blocks, stage)


@pytest.mark.parametrize("stage", ["infer", "evaluate"])
def test_half_as_many_are_taken_where_memory_runs_out(gpus, on_cpu, tmp_path, stage):
    """Where there are batches to be halved: in the later half of the work."""
    wanted = on_cpu({"infer": {"save_deltas": True, "batch_size": 4}, "evaluate": {"batch_size": 8}}, "run", "evaluate")
    whole = gpus(about_to(wanted, tmp_path / "whole", stage), stage).seen["allocations"]
    folder = about_to(wanted, tmp_path / "gpu", stage)
    done = gpus(folder, stage, oom_at=(whole * 70 // 100, whole * 90 // 100))
    assert done.stderr.count("memory ran out: from here on ") == 2, done.shown
    assert_same(folder, wanted, stage)
