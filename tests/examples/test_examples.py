"""The examples as a user runs them: digits and bring_your_own whole, MNIST as far as its data allow."""

import numpy as np
import pytest
from folders import example, put


def test_digits_end_to_end(ocd, tmp_path):
    folder = example("digits", tmp_path)
    stages = ocd.json(folder, "run")["stages"]
    metrics = stages["infer"]["metrics"]
    assert list(metrics) == ["base", "ocd one draw", "ocd ensemble"]
    assert metrics["base"]["accuracy"] > 0.9
    # What a working pipeline shows on any seed: deltas are learned, and from the sample's own conditioning.
    assert stages["train-diffusion"]["cosine"] > 0.8
    assert stages["train-diffusion"]["cosine"] > stages["train-diffusion"]["cosine_shuffled"] + 0.1
    assert stages["collect"]["overfit_loss"] < stages["collect"]["base_loss"]
    found = folder.predictions()
    assert found["member_output"].shape == (600, 5, 10)
    results = ocd.json(folder, "evaluate")
    rows = {row["name"]: row["metrics"]["cross_entropy"] for row in results["rows"]}
    assert rows["ocd ensemble"]["mean"] == pytest.approx(metrics["ocd ensemble"]["cross_entropy"], rel=1e-4)
    assert rows["shuffled conditioning"]["mean"] > rows["ocd ensemble"]["mean"]
    ocd(folder, "verify")


def test_bring_your_own_goes_from_two_files_to_predictions_in_one_command(ocd, tmp_path):
    folder = example("bring_your_own", tmp_path)
    fast = ("--set", "train-diffusion.max_steps=100", "--set", "train-scale.max_steps=100")
    stages = ocd.json(folder, "run", *fast)["stages"]
    assert stages["infer"]["inputs"] == 169
    # A training more, which nothing here looks at.
    assert len(ocd.json(folder, "evaluate", *fast, "--set", "evaluate.longer_base=false")["rows"]) == 18
    assert ocd(folder, "probe", "--layer", "head.weight").stdout
    assert np.isfinite(folder.predictions()["output"]).all()


def test_init_alone_writes_a_file_that_works(ocd, tmp_path):
    ocd(None, "init", "--config", tmp_path)
    few = put("train-diffusion.max_steps=50", "train-scale.max_steps=50")
    stages = ocd.json(None, "run", "--config", tmp_path, *few, "--set", "select-layer.draws=50")["stages"]
    assert stages["infer"]["metrics"]["base"]["accuracy"] > 0.5


def test_mnist_reads_the_real_data(ocd, tmp_path, real_data):
    real_data("mnist/train-images-idx3-ubyte.gz")
    folder = example("mnist_lenet5", tmp_path)
    few = ("collect.samples=200", "train-diffusion.max_steps=20", "train-scale.max_steps=50", "select-layer.draws=20")
    few += ("task.args.classifier_epochs=1", "evaluate.samples=40", "evaluate.validation_samples=20")
    few += ("train-diffusion.tune_after=10",)
    words = put(*few)
    ocd(folder, "run", "--until", "train-scale", *words)
    summary = folder.summary("collect")
    assert summary["shape"] == [84, 120]
    base = folder.summary("train-base")
    assert base["test"]["accuracy"] > 0.95
    results = ocd.json(folder, "evaluate", *words)
    assert {"classifier on I(x)", "classifier on I(x) and x"} <= {row["name"] for row in results["rows"]}
