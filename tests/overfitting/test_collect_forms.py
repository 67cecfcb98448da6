"""collect on bases of half precision, by slow methods, and with samples that are left out."""

import json
import re

import numpy as np
import pytest
import torch
from collecting import assert_as_wanted, base_of, reference_of
from folders import blocks_of, store
from torch import nn

from stages.tasks.modules import load_object

LATER = ("train-diffusion", "train-scale", "infer")


@pytest.fixture
def with_bad_rows(project, finished_run, ocd):
    """Makes a project whose store has samples of NaN at these positions, about to collect; gives it and their numbers.

    Nobody trains on NaN: the base is imported, and the layer is chosen by other samples.
    """

    def make(*positions):
        rows = store(finished_run)["sample_index"][list(positions)].tolist()
        settings = {
            "task": {"train": "data:Rows"},
            "select-layer": {"layer": "2.weight", "samples": 1},
            "collect": {"block_samples": 8, "batch_size": 4},
        }
        folder = project(settings, code="models")
        (folder.root / "nan.json").write_text(json.dumps(rows))
        ocd(folder, "train-base", "--weights", finished_run.run / "train-base" / "base.safetensors")
        ocd(folder, "select-layer")
        return folder, rows

    return make


def test_a_sample_that_is_not_finite_is_named(with_bad_rows, ocd):
    folder, (row,) = with_bad_rows(21)
    result = ocd(folder, "collect", "--quiet", code=1)
    assert result.stderr == (
        f"error: overfitting sample {row} gave numbers that are not finite\n"
        "  try a smaller collect.lr, remove that sample, or leave such samples out with --set collect.skip_bad=true\n"
    )
    assert not (folder.run / "collect").exists()
    # The blocks before it are there.
    assert {0, 1} <= {int(path.stem) for path in blocks_of(folder)}
    # It is another store that leaves samples out: what was begun is not mixed with it.
    result = ocd(folder, "collect", "--set", "collect.skip_bad=true", code=3)
    assert "collect.skip_bad was False, is now True" in result.stderr
    ocd(folder, "collect", "--set", "collect.skip_bad=true", "--force")


@pytest.mark.parametrize("positions", [(21,), (0,), (1, 2, 35)], ids=["in the middle", "the first", "several"])
def test_bad_samples_are_left_out(with_bad_rows, ocd, positions):
    folder, rows = with_bad_rows(*positions)
    words = ("--set", "collect.skip_bad=true")
    summary = ocd.json(folder, "collect", *words)
    assert summary["skipped"] == sorted(rows)
    assert summary["degenerate"] == 0
    assert summary["samples"] == 36
    found = store(folder)
    bad = np.isin(found["sample_index"], rows)
    assert np.flatnonzero(bad).tolist() == list(positions)
    for name, value in found.items():
        if name == "degenerate":
            np.testing.assert_array_equal(value, bad)
        elif name != "sample_index":
            assert not value[bad].any()
            assert np.isfinite(value).all()
    assert summary["base_loss"] == pytest.approx(found["base_loss"][~bad].mean(), rel=1e-5)
    assert f"{len(rows)} left out (not finite)" in ocd(folder, "collect", *words).stdout
    for stage in LATER:
        result = ocd.json(folder, stage, *words)
        if stage != "infer":
            # Some are held out for the evaluation; those left out are in neither part.
            assert result["samples"] == 36 - len(rows) - round((36 - len(rows)) * 0.05)
            assert np.isfinite(result["held_out_loss"])


def test_a_bad_sample_in_a_factored_store(with_bad_rows, ocd):
    folder, rows = with_bad_rows(21)
    words = [f"--set=collect.{word}" for word in ("skip_bad=true", "store=factored", "optimizer=sgd")]
    assert ocd.json(folder, "collect", *words)["skipped"] == rows
    found = store(folder)
    assert not found["delta"][21].any()
    assert np.isfinite(found["delta"]).all()


class HalfButForALayer(nn.Sequential):
    """The base in half precision, its last layer in single: what the deltas are of."""

    def forward(self, x):
        half = self[0].weight.dtype
        return self[2](self[1](self[0](x.to(half))).float()).to(half)


@pytest.mark.parametrize("dtype", ["half", "bfloat16"])
def test_a_base_of_half_precision(project, ocd, dtype):
    folder = project({"select-layer": {"layer": "2.weight"}, "task": {"model": f"mymodel:{dtype}"}}, code="models")
    torch.manual_seed(0)
    model = HalfButForALayer(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    getattr(model, dtype)()
    torch.save(model.state_dict(), folder.root / "given.pt")
    ocd(folder, "train-base", "--weights", folder.root / "given.pt")
    assert {str(value.dtype) for value in base_of(folder).values()} == {str(model[0].weight.dtype)}
    found = ocd.json(folder, "run", "--set", "collect.optimizer=sgd")["stages"]
    assert found["infer"]["metrics"]["ocd ensemble"]["accuracy"] is not None
    deltas = store(folder)
    assert all(value.dtype == np.float32 for name, value in deltas.items() if value.dtype.kind == "f")
    model[2].float()
    wanted = reference_of(folder, model, "2.weight", deltas, steps=2, lr=0.01)
    # Outputs are of half precision, and their gradients with them; the deltas themselves are far finer than that.
    np.testing.assert_allclose(deltas["delta"], wanted.delta.numpy(), rtol=0.02, atol=1e-5)
    assert len(np.unique(deltas["delta"])) > 300
    assert deltas["degenerate"].sum() == 0
    ocd(folder, "infer", "--set", "collect.optimizer=sgd", "--save-deltas")
    ocd(folder, "verify")


def test_a_layer_whose_base_is_half_but_itself_single_is_left_alone(project, ocd):
    folder = project({"task": {"model": "mymodel:HalfBody"}, "select-layer": {"layer": "head.weight"}}, code="models")
    torch.manual_seed(0)
    torch.save({"body.weight": torch.randn(6, 4).half(), "body.bias": torch.zeros(6).half(), "head.weight": torch.randn(3, 6),
                "head.bias": torch.zeros(3)}, folder.root / "given.pt")  # fmt: skip
    ocd(folder, "train-base", "--weights", folder.root / "given.pt")
    ocd(folder, "run", "--until", "train-scale")
    assert store(folder)["rho"].min() > 0


@pytest.mark.parametrize(
    ("model", "name"), [("Attending", "attention.in_proj_weight"), ("Recurrent", "rnn.weight_hh_l0")], ids=["attention", "rnn"]
)
def test_a_slow_way_is_told(project, ocd, model, name):
    settings = {"task": {"model": f"mymodel:{model}"}, "select-layer": {"layer": name}, "collect": {"samples": 12}}
    folder = project(settings, code="models", until="select-layer")
    result = ocd(folder, "collect", "--json")
    summary = json.loads(result.stdout)
    assert summary["method"] in ("vmap", "loop")
    assert summary["method_reason"]
    method = {"vmap": "vmap, not by substitution", "loop": "the plain loop, one sample at a time"}[summary["method"]]
    (line,) = [line for line in result.stderr.splitlines() if "is overfitted by" in line]
    assert line.startswith(f"collect: {name} is overfitted by {method}: {summary['method_reason']}; about ")
    assert re.search(r"; about [\d.]+ ms a sample, \d+:\d\d:\d\d for 12$", line)
    assert f"by {summary['method']}" in ocd(folder, "collect").stdout
    # It is the truth, too.
    base = load_object(folder.root, f"mymodel:{model}", "task.model")()
    base.load_state_dict(base_of(folder))
    found = store(folder)
    assert_as_wanted(found, reference_of(folder, base, name, found, optimizer="adam", lr=0.01, steps=2), rtol=1e-2, atol=1e-5)
    for stage in LATER:
        ocd(folder, stage)


def test_a_fast_way_is_not_worth_a_word(ready, ocd):
    result = ocd(ready, "collect", "--json")
    assert "is overfitted by" not in result.stderr
    found = json.loads(result.stdout)
    assert found["method"] == "outer product"
    assert found["method_reason"] == ""
    assert found["prefix_reused"] is True
