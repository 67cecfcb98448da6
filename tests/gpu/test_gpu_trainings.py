"""Denoisers of every preset are trained, tuned and drawn from on a GPU as on the CPU; two GPUs train as one."""

import socket

import pytest
from comparing import TOLERANCE, assert_alike, assert_same, difference
from folders import put
from trainings import PRESETS, words

QUICK = {"max_steps": 12, "evaluate_steps": 5, "checkpoint_steps": 5, "batch_size": 9, "precision": "float32"}
# A pass of a U-Net takes seconds there.
FEW = {"max_steps": 4, "evaluate_steps": 4, "blocks": 1}
# Dropout is drawn on the GPU, by its own generator.
ALL = {
    "mlp": PRESETS["mlp"],
    "factored": PRESETS["factored"],
    "small": PRESETS["small"] | FEW,
    "paper": PRESETS["paper"] | FEW,
    "authors": PRESETS["authors"] | FEW | {"dropout": 0.0},
}
DRAWN_FROM = ("mlp", "factored", "paper")
TUNED = {"tune_after": 6, "tune_samples": 3}


@pytest.fixture(scope="module")
def collected_on_cpu(trained_on_cpu, tmp_path_factory):
    """The denoiser is yet to be trained."""
    return trained_on_cpu.copy(tmp_path_factory.mktemp("collected") / "cpu").without("train-diffusion", "infer", "evaluate")


@pytest.fixture
def pair(collected_on_cpu, tmp_path):
    """A copy for either device."""
    return tuple(collected_on_cpu.copy(tmp_path / name) for name in ("gpu", "cpu"))


def both(gpus, ocd, pair, command, *settings):
    """The same on the GPU, whose command is given back, and on the CPU."""
    found, wanted = pair
    ocd(wanted, command, *settings, "--quiet", "--device", "cpu")
    return gpus(found, command, *settings)


@pytest.mark.parametrize("name", ALL)
def test_every_preset(gpus, ocd, pair, name):
    settings = words(QUICK | ALL[name])
    both(gpus, ocd, pair, "train-diffusion", *settings)
    assert_same(*pair, "train-diffusion", tolerance=1e-3)
    if name in DRAWN_FROM:
        both(gpus, ocd, pair, "infer", *settings)
        assert_same(*pair, "infer", tolerance=1e-3)


def test_ancestral_sampling(gpus, ocd, pair):
    for command, *more in (("train-diffusion",), ("infer", "--sampler", "ddpm", "--save-deltas")):
        both(gpus, ocd, pair, command, *words(QUICK), *more)
    assert_same(*pair, "train-diffusion", "infer")


def test_tuning(gpus, ocd, pair):
    both(gpus, ocd, pair, "train-diffusion", *words(QUICK | TUNED))
    assert_same(*pair, "train-diffusion")


PLACES = {"auto": "kept on the GPU", "1": "kept in memory", "0": "read from the disk while training"}


@pytest.mark.parametrize("memory", PLACES)
def test_wherever_the_store_lies(gpus, ocd, pair, memory):
    done = both(gpus, ocd, pair, "train-diffusion", *words(QUICK | {"store_memory": memory}))
    assert f"the store is {PLACES[memory]}" in done.stderr
    assert_same(*pair, "train-diffusion")


def test_half_precision_differs_little(gpus, pair):
    losses = []
    for folder, precision in zip(pair, ("float32", "bfloat16"), strict=True):
        gpus(folder, "train-diffusion", *words(QUICK | ALL["small"] | {"precision": precision}))
        losses.append([row["loss"] for row in folder.read("train-diffusion/metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def as_rank(rank, port):
    """The environment that torchrun gives one of two processes."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OCD_RANKS_TIMEOUT": "60"}


def on_both(gpus, folder, *args):
    """A command on both GPUs, each in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [gpus.start(folder, *args, environment=as_rank(rank, port)) for rank in range(2)]
    return [command.wait() for command in started]


@pytest.mark.parametrize("more", [{}, TUNED], ids=["deltas", "tuned"])
def test_two_gpus_train_as_one(gpus, ocd, pair, more):
    found, wanted = pair
    settings = words(QUICK | more)
    ocd(wanted, "train-diffusion", *settings, "--quiet", "--device", "cpu")
    first, second = on_both(gpus, found, "train-diffusion", *settings)
    assert (first.seen["devices"], second.seen["devices"]) == ([0], [1])
    assert_same(found, wanted, "train-diffusion")


@pytest.mark.parametrize("stage", ["train-base", "select-layer", "collect", "train-scale", "infer", "evaluate"])
def test_a_process_computes_on_its_own_gpu(gpus, trained_on_cpu, tmp_path, stage):
    found = trained_on_cpu.copy(tmp_path / "gpu").without(stage)
    done = gpus(found, stage, environment=as_rank(1, 1))
    assert done.seen["devices"] == [1]
    assert_same(found, trained_on_cpu, stage)


def test_probe(gpus, ocd, trained_on_cpu, tmp_path):
    found = trained_on_cpu.copy(tmp_path / "gpu")
    # A small run is left out where it would take long, as on a pretended GPU.
    asked = ["probe", "--quick", "--layer", "0.weight", "--samples", "8", "--json", "--quiet", *put("train-diffusion.width=16")]
    done = gpus(found, *asked)
    wanted = ocd(trained_on_cpu, *asked, "--device", "cpu")
    assert_alike(done.stdout, wanted.stdout)


def test_a_unet_predicts_in_half_precision_where_that_does_not_show(gpus, ocd, pair):
    found, wanted = pair
    settings = words(QUICK | ALL["small"])
    for folder in pair:
        ocd(folder, "train-diffusion", *settings, "--quiet", "--device", "cpu")
    ocd(wanted, "infer", *settings, "--quiet", "--device", "cpu")
    gpus(found, "infer", *settings)
    assert found.summary("infer/test")["precision"] == "bfloat16"
    assert "precision" not in wanted.summary("infer/test")
    assert_same(found, wanted, "infer", tolerance=1e-3)


@pytest.mark.parametrize("row", ["nearest k blended in layer input", "mean network", "mean delta of class"])
def test_rows_of_evaluate_predict_the_same(gpus, ocd, on_cpu, tmp_path, row):
    wanted = on_cpu({}, "run", "evaluate").copy(tmp_path / "cpu")
    found, name = wanted.copy(tmp_path / "gpu"), f"test+{row.replace(' ', '-')}"
    ocd(wanted, "infer", "--row", row, "--quiet", "--device", "cpu")
    gpus(found, "infer", "--row", row)
    mine, its = found.predictions(name), wanted.predictions(name)
    assert mine.keys() == its.keys()
    for array in ("output", "member_output", "base_output"):
        assert difference(mine[array], its[array]) < TOLERANCE, array
