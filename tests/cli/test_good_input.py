"""Input that looks odd and is good: beside what is refused, what must not be."""

import numpy as np
import pytest
import torch
from folders import arrays, own_task
from safetensors.torch import load_file, save_file


@pytest.mark.parametrize(
    ("code", "task", "until"),
    [
        ("tasks", own_task("task:Own"), "collect"),
        ("models", {"loss": "mymodel:plain_loss"}, "infer"),
        ("models", {"model": "mymodel:with_running_statistics"}, "infer"),
    ],
    ids=["a task of one's own", "a loss of one's own", "running statistics"],
)
def test_projects_that_run(project, ocd, code, task, until):
    ocd(project({"task": task}, code=code), "run", "--until", until)


def test_float64_is_converted(project, ocd, finished_run):
    folder = project()
    x, y = arrays(40, 0)
    folder.save("train.npz", x.astype(np.float64), y.astype(np.uint8))
    ocd(folder, "train-base")
    base = "train-base/base.safetensors"
    assert (folder.run / base).read_bytes() == (finished_run.run / base).read_bytes()


def test_output_that_is_a_dict(project, ocd):
    settings = {
        "task": {"model": "mymodel:TwoOutputs", "loss": "mymodel:loss_of_logits"},
        "select-layer": {"layer": "body.weight"},
    }
    folder = project(settings, code="models")
    ocd(folder, "run")
    shapes = {name: values.shape for name, values in folder.predictions().items()}
    assert shapes["output.logits"] == shapes["base_output.logits"] == (24, 3)
    assert shapes["output.hidden"] == shapes["base_output.hidden"] == (24, 2)
    assert shapes["member_output.logits"] == (24, 2, 3)
    # One more member, too.
    ocd(folder, "infer", "--ensemble", 3)
    assert folder.predictions()["member_output.logits"].shape == (24, 3, 3)


# Imported weights


@pytest.fixture(scope="session")
def trained(finished_run):
    return load_file(finished_run.run / "train-base" / "base.safetensors")


IMPORTS = {
    "safetensors": lambda path, state: save_file(state, path),
    "plain": lambda path, state: torch.save(state, path),
    "nested under state_dict": lambda path, state: torch.save({"epoch": 3, "state_dict": state}, path),
    "nested under model": lambda path, state: torch.save({"model": state, "optimizer": {"lr": 1}}, path),
    "prefixed": lambda path, state: torch.save({f"module.{k}": v for k, v in state.items()}, path),
    "nested and prefixed": lambda path, state: torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path),
}


@pytest.mark.parametrize("name", IMPORTS)
def test_weights_import(project, ocd, trained, finished_run, name):
    folder = project()
    path = folder.root / ("weights.safetensors" if name == "safetensors" else "weights.pt")
    IMPORTS[name](path, trained)
    summary = ocd.json(folder, "train-base", "--weights", path)
    assert summary["imported"] == path.name
    base = "train-base/base.safetensors"
    assert (folder.run / base).read_bytes() == (finished_run.run / base).read_bytes()
