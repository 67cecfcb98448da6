"""TinyNeRF: its rendering and its task against plain loops, and the whole example on small scenes of spheres."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from evaluating import ROWS
from folders import blocks_of, reader_of, results, states, store
from processes import redone, stopped_at
from spheres import bytes_of, camera, cameras, focal_of, picture
from strips import drawn, panes
from tinynerf import LR, RAYS, REPEATS, SIZE, STEPS, TEST, TRAIN, VALIDATION, make_example, make_scene, nerf, task

from stages.foundation.seeds import generator
from stages.infer import open_run
from stages.tasks.data import Split

# A regression has no classes, and this one a row of its own.
TABLE = [row for row in ROWS if row not in ("temperature-scaled base", "mean delta of class")]
TABLE += ["base trained 1.5 times as long"]


@pytest.fixture(scope="module")
def told_example(ocd, tmp_path_factory):
    """The example with everything done, what its run told and what evaluate found; not to be changed."""
    example = make_example(tmp_path_factory.mktemp("tinynerf"), "scene")
    make_scene(example.root / "scene")
    told = ocd(example, "run", "--json")
    return example, told, ocd.json(example, "evaluate")


@pytest.fixture(scope="module")
def finished_example(told_example):
    return told_example[0]


@pytest.fixture
def example(finished_example, tmp_path):
    """A copy of it."""
    return finished_example.copy(tmp_path / "tinynerf")


@pytest.fixture(scope="module")
def scene_task(finished_example):
    """The task on the same scene, and the trained base."""
    base = open_run(finished_example.config, overrides=["run.device=cpu"]).model
    return task.NerfTask(str(finished_example.root / "scene"), rays=RAYS), base


# The task


def test_metrics_of_pictures(scene_task):
    nerf_task, base = scene_task
    data = nerf_task.test()
    with torch.no_grad():
        output = base(data.x)
    found = nerf_task.metrics(output, data.y)
    assert list(found) == ["mse", "psnr", "ssim"]
    for view in range(TEST):
        error = float((output[view] - data.y[view]).double().square().mean())
        assert float(found["mse"][view]) == pytest.approx(error, rel=1e-5)
        assert float(found["psnr"][view]) == pytest.approx(-10 * math.log10(error), rel=1e-5)
    assert (found["ssim"] < 0.999).all()
    same = nerf_task.metrics(data.y, data.y)
    assert same["ssim"].tolist() == pytest.approx([1.0] * TEST)
    assert torch.isfinite(same["psnr"]).all()


# The whole example


def test_the_run_is_whole(ocd, finished_example, told_example):
    assert set(states(ocd, finished_example).values()) == {"done"}
    ocd(finished_example, "verify")
    stages = json.loads(told_example[1].stdout)["stages"]
    assert stages["collect"]["shape"] == [128, 63]
    assert (stages["collect"]["method"], stages["collect"]["method_reason"]) == ("substitution", "")
    assert (stages["collect"]["samples"], stages["collect"]["repeats"]) == (TRAIN, REPEATS)
    assert stages["collect"]["overfit_loss"] < stages["collect"]["base_loss"]
    for metrics in (*stages["infer"]["metrics"].values(), stages["train-base"]["test"]):
        assert {"mse", "psnr", "ssim"} <= metrics.keys()


def test_what_train_base_tells(finished_example, told_example):
    told = told_example[1].stderr.splitlines()
    assert f"train-base: {TRAIN + VALIDATION + TEST} pictures have an alpha channel: composited on black" in told
    assert any(line.startswith("train-base: 60 of 60 steps, ") and "mse 0." in line for line in told)
    assert not any("Warning" in line for line in told)
    log = (finished_example.run / "train-base" / "log.txt").read_text()
    assert "composited on black" in log
    assert "60/60 steps mse=0." in log


class OnProgress:
    """A report that keeps what it hears."""

    def __init__(self):
        self.messages, self.steps = [], []

    def progress(self, done, total, unit, **figures):
        self.steps.append((done, total, unit, *figures))

    def message(self, text):
        self.messages.append(text)


def test_a_network_that_renders_nothing_begins_anew(scene_task):
    """Most of these seeds die in the first steps, which no gradient mends."""
    nerf_task, begun = scene_task[0], 0
    short, rows = task.NerfTask(base_steps=60, base_rays=32), Split(nerf_task.train())
    short.scene = nerf_task.scene
    for seed in range(4):
        torch.manual_seed(seed)
        model, on_progress = nerf.TinyNeRF(), OnProgress()
        short.train_base(model, rows, rows, report=on_progress, device=torch.device("cpu"))
        with torch.no_grad():
            assert model.eval()(rows.batch([0])[0]).max() > 0.05
        assert on_progress.steps[-2:] == [(50, 60, "steps", "mse"), (60, 60, "steps", "mse")]
        begun += any(text.startswith("begun ") for text in on_progress.messages)
    assert begun >= 2


def test_the_store_holds_repeats_of_each_view(finished_example):
    arrays = store(finished_example)
    assert arrays["delta"].shape == (TRAIN * REPEATS, 128, 63)
    pairs = arrays["sample_index"].reshape(TRAIN, REPEATS)
    assert (pairs[:, 0] == pairs[:, 1]).all()
    assert sorted(pairs[:, 0].tolist()) == list(range(TRAIN))
    first, second = arrays["delta"][::2], arrays["delta"][1::2]
    assert (np.abs(first - second).reshape(TRAIN, -1).max(1) > 1e-4).all()
    np.testing.assert_array_equal(arrays["camera"][::2], arrays["camera"][1::2])
    wanted = cameras("train", TRAIN)[pairs[:, 0], :3, 3]
    np.testing.assert_allclose(arrays["camera"][::2], wanted, atol=1e-5)
    assert set(reader_of(finished_example).field_names()) == {"layer_input", "activation", "base_output", "camera"}
    assert (arrays["overfit_loss"] < arrays["base_loss"]).all()


def test_deltas_are_those_of_a_plain_loop(finished_example, scene_task):
    """Adam on the first layer's weight alone, on the rays that view() draws for a sample, a repeat and a step."""
    nerf_task, base = scene_task
    data, arrays = nerf_task.train(), store(finished_example)
    for row in (0, 1, 6, 11):
        sample, repeat = int(arrays["sample_index"][row]), row % REPEATS
        model = nerf.TinyNeRF().eval().requires_grad_(False)
        model.load_state_dict(base.state_dict())
        start, weight = model.layer1.weight.detach().clone(), model.layer1.weight.requires_grad_(True)
        optimizer = torch.optim.Adam([weight], lr=LR)
        for step in range(STEPS):
            seed = (1, "collect", sample, step) if repeat == 0 else (1, "collect", sample, step, repeat)
            x, y = nerf_task.view(data.x[sample], data.y[sample], generator(*seed))
            optimizer.zero_grad()
            (model(x.unsqueeze(0)) - y.unsqueeze(0)).square().mean().backward()
            optimizer.step()
        wanted, found = (weight - start).detach(), torch.from_numpy(arrays["delta"][row])
        # Adam's first steps are signs: where a gradient is next to nothing, rounding decides.
        assert float((found - wanted).norm()) < 1e-2 * float(wanted.norm())
        with torch.no_grad():
            loss = (model(data.x[sample : sample + 1])[0] - data.y[sample]).square().mean()
        assert float(arrays["overfit_loss"][row]) == pytest.approx(float(loss), rel=1e-3)


def test_pictures_of_every_test_view(finished_example, scene_task):
    folder = finished_example.run / "infer" / "test" / "pictures"
    assert sorted(path.name for path in folder.iterdir()) == [f"{row:06d}.png" for row in range(TEST)]
    found, truth = finished_example.predictions(), scene_task[0].test().y
    for row in range(TEST):
        strip = panes(finished_example, row, SIZE)
        assert len(strip) == 4
        np.testing.assert_array_equal(strip[0], drawn(found["base_output"][row]).reshape(SIZE, SIZE, 3))
        np.testing.assert_array_equal(strip[2], drawn(found["output"][row]).reshape(SIZE, SIZE, 3))
        np.testing.assert_array_equal(strip[3], drawn(truth[row].numpy()).reshape(SIZE, SIZE, 3))
        assert not np.array_equal(strip[0], strip[1])
        # The truth is the picture as it was drawn, on black.
        wanted = bytes_of(picture(cameras("test", TEST)[row], (SIZE, SIZE), focal_of((SIZE, SIZE))), alpha=False)
        assert np.abs(strip[3].astype(int) - wanted).max() <= 2


def test_the_table_has_the_rows_of_the_paper(finished_example, told_example):
    rows = {row["name"]: row["metrics"] for row in told_example[2]["rows"]}
    assert list(rows) == TABLE
    for metrics in rows.values():
        assert {"mse", "psnr", "ssim"} <= metrics.keys()
    assert told_example[2]["metric"] == "mse"
    base, fitted = rows["base"]["mse"]["mean"], rows["overfitted on test"]["mse"]["mean"]
    assert fitted < base
    infer = finished_example.summary("infer/test")["metrics"]
    for name in ("base", "ocd one draw", "ocd ensemble"):
        assert rows[name]["psnr"]["mean"] == pytest.approx(infer[name]["psnr"], rel=1e-4)
    assert told_example[2]["validation_samples"] == VALIDATION
    assert told_example[2]["memorisation"]["samples"] == TEST


def test_new_cameras_need_no_pictures(ocd, example):
    """Rays alone, of views that no data set holds: written down here, not by the example's loader."""
    pose, focal = camera(0.3, 0.4), focal_of((SIZE, SIZE))
    places = [((c + 0.5 - SIZE / 2) / focal, (SIZE / 2 - r - 0.5) / focal, -1.0) for r in range(SIZE) for c in range(SIZE)]
    directions = np.array(places) @ pose[:3, :3].T
    rays = np.concatenate([np.broadcast_to(pose[:3, 3], directions.shape), directions], axis=1).astype(np.float32)
    np.savez(example.root / "rays.npz", x=np.stack([rays, rays]))
    shown = ocd.json(example, "infer", "--input", example.root / "rays.npz")
    assert (shown["inputs"], shown["pictures"], shown["metrics"]) == (2, 2, None)
    found, strip = example.predictions("rays"), panes(example, 0, SIZE, "rays")
    assert len(strip) == 2
    np.testing.assert_array_equal(strip[0], drawn(found["base_output"][0]).reshape(SIZE, SIZE, 3))
    np.testing.assert_array_equal(strip[1], drawn(found["output"][0]).reshape(SIZE, SIZE, 3))
    # The base knows the scene: what it renders there is nearer to the truth than black is.
    truth = bytes_of(picture(pose, (SIZE, SIZE), focal), alpha=False) / 255
    assert np.square(found["base_output"][0].reshape(SIZE, SIZE, 3) - truth).mean() < 0.5 * np.square(truth).mean()


def test_collect_goes_on_where_it_was_stopped(ocd, example):
    whole = results(example, "collect")
    shutil.rmtree(example.run / "collect")
    with stopped_at(2):
        ocd(example, "collect", "--quiet", code=4)
    assert len(blocks_of(example)) == 2
    assert redone(ocd, example, "collect", "--quiet") == [2, 3]
    assert results(example, "collect") == whole


def test_rays_of_pictures_of_another_size(ocd, example):
    np.savez(example.root / "few.npz", x=np.ones((2, 10, 6), np.float32))
    shown = ocd(example, "infer", "--quiet", "--input", example.root / "few.npz", code=2).stderr
    assert shown.startswith("error: few.npz")
    assert "(10, 6)" in shown
    assert f"({SIZE * SIZE}, 6)" in shown
    assert not (example.run / "infer" / "few").exists()


def test_another_picture_is_another_scene(ocd, example):
    shutil.copy(example.root / "scene" / "train" / "r_1.png", example.root / "scene" / "train" / "r_0.png")
    assert "train" in ocd(example, "train-base", "--quiet", code=3).stderr
