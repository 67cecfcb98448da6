"""Inference: no label on the way, members by number, answers to several queries, and the Python door."""

import numpy as np
import pytest
import reference
import torch
import zarr
from folders import own_task

from stages.infer import open_run


def test_no_label_is_read_on_the_way_to_a_prediction(ocd, finished):
    """Inputs with true labels, with other labels and without any give the same bytes."""
    with np.load(finished.root / "test.npz") as data:
        x, y = data["x"], data["y"]
    finished.save("wrong.npz", x, (y + 1) % 3)
    finished.save("bare.npz", x)
    true = finished.predictions()
    for name in ("wrong", "bare"):
        result = ocd.json(finished, "infer", "--input", finished.root / f"{name}.npz")
        assert (result["metrics"] is None) == (name == "bare")
        found = finished.predictions(name)
        assert {key: value.tobytes() for key, value in found.items()} == {key: value.tobytes() for key, value in true.items()}


def test_every_member_is_the_base_with_its_delta(ocd, finished):
    """Against a copy of the model for each input and member; and the ensemble is the mean probability."""
    ocd(finished, "infer", "--save-deltas", "--ensemble", "3")
    found = finished.predictions()
    assert list(found) == ["rho", "sample_index", "class", "probability", "base_output", "output", "member_output"]
    assert found["sample_index"].tolist() == list(range(24))
    deltas = zarr.open_group(finished.run / "infer" / "test" / "deltas.zarr", mode="r")["delta"][:]
    model, x = open_run(finished.config), torch.from_numpy(np.load(finished.root / "test.npz")["x"])
    assert deltas.shape == (24, 3, *model.layer.matrix_shape)
    np.testing.assert_allclose(np.linalg.norm(deltas.reshape(24, 3, -1), axis=2), found["rho"][:, None].repeat(3, 1), rtol=1e-4)
    wanted = reference.predict_loop(model.model, model.layer.name, x, torch.from_numpy(deltas))
    np.testing.assert_allclose(found["member_output"], wanted.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["base_output"], model.model(x).numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["output"], wanted.softmax(2).mean(1).log().numpy(), atol=1e-5)


def test_what_comes_before_the_layer_is_computed_once(ocd, project):
    """Whatever the ensemble: the base, the conditioning and all members come from one pass through it."""
    folder, calls = project({"select-layer": {"layer": "2.weight"}}), []
    ocd(folder, "run", "--quiet")
    model = open_run(folder.config)
    assert model.runner.method.name == "substitution"
    before, after = model.model[0], model.model[1]
    for module in (before, after):
        inner = module.forward
        module.forward = lambda x, inner=inner, module=module: calls.append(module) or inner(x)
    for members in (1, 7):
        model.predict(np.load(folder.root / "test.npz")["x"], members)
        assert calls == [before, after]
        calls.clear()


def test_another_setting_redoes_the_answer_and_says_so(ocd, finished):
    assert not np.allclose(finished.predictions()["output"], finished.predictions()["base_output"])
    result = ocd(finished, "infer", "--strength", "0")
    assert "infer is redone: infer.strength was 1.0, is now 0.0" in result.stderr
    found = finished.predictions()
    for member in range(2):
        # The layer's product with weights of its own for each sample rounds otherwise than the base's.
        np.testing.assert_allclose(found["member_output"][:, member], found["base_output"], atol=1e-6)


@pytest.mark.parametrize("batch", [1, 7, 24])
def test_nothing_depends_on_the_batch(ocd, finished, batch):
    before, summary = finished.predictions(), finished.summary("infer/test")
    ocd(finished, "infer", "--force", "--set", f"infer.batch_size={batch}")
    np.testing.assert_allclose(finished.predictions()["member_output"], before["member_output"], atol=1e-5)
    found = finished.summary("infer/test")
    assert found["rho"] == pytest.approx(summary["rho"], rel=1e-5)
    for row, figures in found["metrics"].items():
        assert figures == pytest.approx(summary["metrics"][row], rel=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("steps", [1, 10])
def test_every_sampler_gives_finite_predictions(ocd, finished, sampler, steps):
    ocd(finished, "infer", "--sampler", sampler, "--sample-steps", steps)
    assert np.isfinite(finished.predictions()["output"]).all()


def test_splits_and_files_have_answers_of_their_own(ocd, finished):
    for split in ("validation", "train"):
        ocd(finished, "infer", "--split", split)
    (finished.root / "train.npz").rename(finished.root / "given.npz")
    finished.save("train.npz", *np.load(finished.root / "given.npz").values())
    ocd(finished, "infer", "--input", finished.root / "test.npz")
    assert {path.name for path in (finished.run / "infer").iterdir()} == {"test", "validation", "train", "input-test"}
    found = ocd.json(finished, "status")
    assert found["queries"] == ["input-test", "train", "validation"]
    assert found["stages"]["infer"]["state"] == "done"
    assert "input-test, train, validation" in ocd(finished, "status").stdout
    np.testing.assert_array_equal(finished.predictions("input-test")["output"], finished.predictions()["output"])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_npy_file_gives_the_same_bytes(finished, ocd, dtype):
    with np.load(finished.root / "test.npz") as data:
        x = data["x"].astype(dtype)
    np.savez(finished.root / "one.npz", x=x)
    np.save(finished.root / "other.npy", x)
    for file in ("one.npz", "other.npy"):
        ocd(finished, "infer", "--input", finished.root / file)
    one, other = ((finished.run / "infer" / name / "predictions.npz").read_bytes() for name in ("one", "other"))
    assert one == other
    assert finished.summary("infer/other")["metrics"] is None


def test_the_python_door_gives_the_commands_numbers(finished):
    x = np.load(finished.root / "test.npz")["x"]
    found = open_run(finished.config).predict(x, ensemble=2)
    wanted = finished.predictions()
    np.testing.assert_allclose(found.output.numpy(), wanted["output"], atol=1e-6)
    np.testing.assert_allclose(found.members.numpy().swapaxes(0, 1), wanted["member_output"], atol=1e-6)
    np.testing.assert_array_equal(found.base_output.numpy(), wanted["base_output"])
    assert open_run(finished.config).predict(x.astype(np.float64)).members.shape[0] == 2  # the setting's ensemble


def test_a_task_of_ones_own_with_dicts_views_and_conditioning(ocd, project):
    folder = project({"task": own_task("task:Paired")}, code="tasks")
    ocd(folder, "run")
    group = zarr.open_group(folder.run / "collect" / "deltas.zarr", mode="r")
    assert {"both", "layer_input"} <= set(group.array_keys())
    assert "base_output" not in set(group.array_keys())
    found = folder.predictions()
    assert found["member_output.logits"].shape == (12, 2, 3)
    np.testing.assert_allclose(np.exp(found["output.logits"]).sum(1), 1, atol=1e-5)
