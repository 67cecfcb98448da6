"""Rows that change no weight of the base: labels of the nearest training samples, and ensembles of bases."""

import numpy as np
import pytest
import torch
from evaluating import evaluated, rows_of

from stages.foundation.progress import Silent
from stages.lifecycle.context import RunContext
from stages.run_directory.project import load_project

DEEP, LABELS, PAPER = "deep ensemble", "nearest neighbours' labels", "ocd by the paper's objective"


@pytest.fixture(scope="module")
def tuned(make_run, ocd):
    """A classifier's run whose networks are told of neighbours, with all rivals in its table."""
    folder = make_run({"train-diffusion": {"neighbours": 3}}, "plain", "train-scale", rows=120)
    return folder, evaluated(ocd, folder, "--add", DEEP, "--add", PAPER)


def test_the_vote_of_the_nearest_training_samples(ocd, tuned):
    folder, _ = tuned
    ocd(folder, "infer", "--row", LABELS)
    found = folder.predictions("test+nearest-neighbours-labels")["output"]
    train, test = (np.load(folder.root / f"{name}.npz") for name in ("train", "test"))
    kept = RunContext(load_project(folder.config), Silent()).splits["train"].rows.numpy()
    x, y = train["x"][kept].reshape(len(kept), -1), train["y"][kept]
    for row, sample in zip(found, test["x"].reshape(len(found), -1), strict=True):
        near = np.argsort(np.linalg.norm(x - sample, axis=1), kind="stable")[:5]
        votes = np.bincount(y[near], minlength=row.shape[-1])
        np.testing.assert_allclose(row, np.log((votes + 1 / len(votes)) / 6), rtol=1e-5)


def test_a_deep_ensemble_is_the_mean_of_five_bases(ocd, tuned):
    """All of them have learned from the same samples."""
    folder, results = tuned
    ocd(folder, "infer", "--row", DEEP)
    found = folder.predictions("test+deep-ensemble")
    own = RunContext(load_project(folder.config), Silent())
    x = own.test_split.inputs(torch.arange(len(own.test_split)))
    outputs = [own.base(x)]
    for seed in range(2, 6):
        branch = folder.run / f"branches/deep-ensemble-{seed}"
        identity = own.manifest_of("train-base").identity.inputs
        other = RunContext(load_project(folder.config, run=branch), Silent())
        assert other.manifest_of("train-base").identity.inputs == identity
        outputs.append(other.another_base()(x))
    assert found["member_output"].shape[1] == 5
    np.testing.assert_allclose(found["member_output"][:, 3], outputs[3].detach().numpy(), rtol=1e-4, atol=1e-5)
    wanted = torch.stack(outputs).softmax(2).mean(0).log().detach().numpy()
    np.testing.assert_allclose(found["output"], wanted, rtol=1e-4, atol=1e-5)
    assert rows_of(results)[DEEP]["metrics"]["auroc_of_disagreement"]["mean"] > 0


def test_ocd_by_the_papers_objective_knows_of_no_neighbours(tuned):
    folder, results = tuned
    assert PAPER in rows_of(results)
    described = folder.read("branches/paper-objective/train-diffusion/denoiser.json")
    assert "neighbours" not in described["fields"]
    assert "neighbours" in folder.read("train-diffusion/denoiser.json")["fields"]


def test_what_is_so_already_is_left_out(ocd, make_run):
    folder = make_run({}, "plain", "train-scale")
    left_out = {entry["name"]: entry["reason"] for entry in evaluated(ocd, folder, "--add", PAPER)["left_out"]}
    assert left_out[PAPER] == "the run's own denoiser is trained by it"
    assert left_out[DEEP] == "not asked for: it takes a training; ask with --add 'deep ensemble'"
