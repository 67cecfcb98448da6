"""Whole runs on a GPU are the CPU's, whatever the model and however its layer is overfitted."""

import pytest
from comparing import assert_same
from folders import example, put

STAGES = ("select-layer", "collect", "train-diffusion", "train-scale", "infer")
SAVED = {"infer": {"save_deltas": True}}
# name: the model, its inputs, further settings, what the store records as the method
MODELS = {
    "perceptron": ("net", "", {}, "outer product"),
    "convolution": ("convolution", "sequences", {"select-layer": {"layer": "0.weight"}}, "substitution"),
    "an embedding, by vmap": ("words", "words", {"select-layer": {"layer": "0.weight"}}, "vmap"),
    "attention, by vmap": ("Attending", "", {"select-layer": {"layer": "attention.in_proj_weight"}}, "vmap"),
    "branches, by the loop": ("Counting", "", {"select-layer": {"layer": "w"}}, "loop"),
    # Its kernels are taken apart on a pretended GPU, which lets vmap run them.
    "a recurrent layer": ("Recurrent", "", {"select-layer": {"layer": "rnn.weight_hh_l0"}}, ""),
    "bfloat16": ("bfloat16", "", {}, "outer product"),
    "factors": ("net", "", {"collect": {"store": "factored", "optimizer": "sgd", "lr": 0.05}}, "outer product"),
}


# The others' evaluations would tell nothing that theirs do not.
EVALUATED = ("perceptron", "an embedding, by vmap", "branches, by the loop")


@pytest.mark.parametrize("name", MODELS)
def test_every_stage_of_a_run(gpus, on_cpu, tmp_path, name):
    model, shaped, settings, method = MODELS[name]
    settings = {**settings, **SAVED, "task": {"model": f"mymodel:{model}"}}
    stages = [*STAGES, *(["evaluate"] if name in EVALUATED else [])]
    commands = ["run", *stages[len(STAGES) :]]
    wanted = on_cpu(settings, *commands, code="models", shaped=shaped)
    found = wanted.copy(tmp_path / "gpu").without(*stages)
    for command in commands:
        gpus(found, command)
    assert not method or found.summary("collect")["method"] == wanted.summary("collect")["method"] == method
    # Half precision rounds sums of another order to other numbers now and then.
    assert_same(found, wanted, *stages, tolerance=2e-2 if name == "bfloat16" else 1e-4)


def test_digits(gpus, ocd, tmp_path):
    wanted = example("digits", tmp_path)
    shorter = put(
        "train-base.epochs=1",
        "select-layer.draws=16",
        "collect.samples=64",
        "train-diffusion.max_steps=20",
        "train-diffusion.preset=mlp",
        "train-diffusion.width=16",
        "train-diffusion.precision=float32",
        "train-scale.max_steps=20",
        "infer.ensemble=2",
        "evaluate.samples=64",
        "evaluate.resamples=100",
    )
    found = wanted.copy(tmp_path / "gpu")
    for command in ("run", "evaluate"):
        ocd(wanted, command, *shorter, "--quiet", "--device", "cpu")
        gpus(found, command, *shorter)
    assert_same(found, wanted, "train-base", *STAGES, "evaluate")
