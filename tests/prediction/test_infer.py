"""Inference: no label on the way, members by number, answers to several queries, and the Python door."""

import numpy as np
import pytest
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


def test_predictions_are_the_base_with_its_deltas(ocd, finished):
    """Each member's output is the base's with θ + delta, computed here by hand, and the ensemble is the mean probability."""
    ocd(finished, "infer", "--save-deltas", "--ensemble", "3")
    found = finished.predictions()
    deltas = zarr.open_group(finished.run / "infer" / "test" / "deltas.zarr", mode="r")["delta"][:]
    model = open_run(finished.config)
    layer, weight = model.layer, model.layer.weight(model.model).clone()
    np.testing.assert_allclose(np.linalg.norm(deltas.reshape(24, 3, -1), axis=2), found["rho"][:, None].repeat(3, 1), rtol=1e-4)
    x = torch.from_numpy(np.load(finished.root / "test.npz")["x"])
    for i in range(4):
        for member in range(3):
            with torch.no_grad():
                model.model.get_parameter(layer.name).copy_(weight + torch.from_numpy(deltas[i, member]).view(layer.shape))
                output = model.model(x[i : i + 1])[0]
            np.testing.assert_allclose(output.numpy(), found["member_output"][i, member], atol=1e-5)
    mean = torch.from_numpy(found["member_output"]).softmax(2).mean(1).log()
    np.testing.assert_allclose(found["output"], mean.numpy(), atol=1e-5)


def test_a_larger_ensemble_keeps_the_members_there_are(ocd, finished):
    before = finished.predictions()["member_output"]
    ocd(finished, "infer", "--ensemble", "5")
    grown = finished.predictions()["member_output"]
    np.testing.assert_array_equal(grown[:, :2], before)
    ocd(finished, "infer", "--ensemble", "5", "--force")
    np.testing.assert_allclose(finished.predictions()["member_output"], grown, atol=1e-6)


def test_another_setting_redoes_the_answer_and_says_so(ocd, finished):
    assert not np.allclose(finished.predictions()["output"], finished.predictions()["base_output"])
    result = ocd(finished, "infer", "--strength", "0")
    assert "infer is redone: infer.strength was 1.0, is now 0.0" in result.stderr
    found = finished.predictions()
    for member in range(2):
        # The layer's product with weights of its own for each sample rounds otherwise than the base's.
        np.testing.assert_allclose(found["member_output"][:, member], found["base_output"], atol=1e-6)


@pytest.mark.parametrize("batch", [1, 7])
def test_predictions_do_not_depend_on_the_batch(ocd, finished, batch):
    before = finished.predictions()
    ocd(finished, "infer", "--force", "--set", f"infer.batch_size={batch}")
    np.testing.assert_allclose(finished.predictions()["member_output"], before["member_output"], atol=1e-5)


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
