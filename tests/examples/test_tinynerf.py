"""TinyNeRF: its rendering and its task against plain loops, and the whole example on small scenes of spheres."""

import importlib.util
import itertools
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import Folder, blocks_of, reader_of, results, states, store
from folders import example as copy_of_example
from PIL import Image
from processes import counted_blocks, stopped_at
from spheres import bytes_of, camera, cameras, focal_of, picture, sphere_npz, sphere_scene

from stages.evaluation.pictures import CAPTION, GAP
from stages.foundation.seeds import generator
from stages.infer import open_run
from stages.per_sample.layer import find_layer
from stages.per_sample.self_check import choose
from stages.tasks.data import Split

SIZE, TRAIN, VALIDATION, TEST, REPEATS, STEPS, LR, RAYS = 12, 8, 5, 4, 2, 3, 0.005, 64
LAYER, SAMPLES, NEAR, FAR = "layer1.weight", 32, 2.0, 6.0
ROWS = [
    "base",
    "overfitted on test",
    "overfitted on test, all layers",
    "nearest neighbour",
    "no scaling",
    "ocd one draw",
    "ocd ensemble",
    "ocd validated strength",
    "mean network",
    "random direction",
    "random training deltas",
    "mean delta",
    "nearest neighbour in layer input",
    "nearest k blended",
    "nearest k blended in layer input",
    "shuffled conditioning",
    "base trained 1.5 times as long",
]


def load(name):
    """A module of the example, under a name that no other test's `task` has."""
    path = Path(__file__).parent.parent.parent / "examples" / "tinynerf" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"tinynerf_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent.parent.parent / "examples" / "tinynerf")])
    nerf, task = load("nerf"), load("task")


def make_example(folder, scene):
    """A copy of the example with settings for a small scene, `scene` being a path from its folder."""
    example = copy_of_example("tinynerf", folder)
    tables = {
        "run": {"seed": 1},
        "task": {"class": "task:NerfTask"},
        "select-layer": {"layer": LAYER, "draws": 0},
        "collect": {"lr": LR, "steps": STEPS, "repeats": REPEATS, "block_samples": 4, "batch_size": 2},
        "train-diffusion": {
            "preset": "mlp",
            "width": 16,
            "blocks": 1,
            "batch_size": 8,
            "max_steps": 20,
            "evaluate_steps": 10,
            "tune_after": 10,
            "conditioning_noise": 0.1,
        },
        "train-scale": {"width": 8, "batch_size": 8, "max_steps": 20, "evaluate_steps": 10},
        "infer": {"ensemble": 2, "sample_steps": 3},
        "evaluate": {"resamples": 100, "strengths": [0.0, 0.5, 1.0]},
    }
    args = f'scene = "{scene}", rays = {RAYS}, glanced_rays = 32, base_steps = 60, base_rays = 128, longer_steps = 30'
    lines = [f'[task]\nargs = {{ {args} }}\nclass = "task:NerfTask"']
    lines.append('[train-diffusion.encoders]\nbase_output = "task:PooledPicture"')
    for table, values in tables.items():
        if table != "task":
            lines.insert(1, f"[{table}]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items()))
    example.config.write_text("\n".join(lines) + "\n")
    return example


def make_scene(folder, **options):
    return sphere_scene(folder, **{"train": TRAIN, "validation": VALIDATION, "test": TEST, "size": SIZE} | options)


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
    return Folder(shutil.copytree(finished_example.root, tmp_path / "tinynerf"))


@pytest.fixture(scope="module")
def scene_task(finished_example):
    """The task on the same scene, and the trained base."""
    base = open_run(finished_example.config, overrides=["run.device=cpu"]).model
    return task.NerfTask(str(finished_example.root / "scene"), rays=RAYS), base


# Rendering


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights_by_hand(density, depths):
    """w_i = T_i (1 − exp(−σ_i δ_i)) with T_i = Π_{j<i} exp(−σ_j δ_j), in python's floats."""
    steps = [after - before for before, after in itertools.pairwise(depths)] + [(FAR - NEAR) / SAMPLES]
    found, passed = [], 1.0
    for sigma, step in zip(density, steps, strict=True):
        found.append(passed * (1 - math.exp(-sigma * step)))
        passed *= math.exp(-sigma * step)
    return found


def encoded_by_hand(point):
    """γ(p): the point, then for each of ten frequencies the sines of its three numbers and their cosines."""
    found = list(point)
    for power in range(10):
        found += [math.sin(2**power * value) for value in point]
        found += [math.cos(2**power * value) for value in point]
    return found


def test_encoding_is_sines_and_cosines():
    points = random(4, 2, 3)
    found = nerf.encode(points)
    assert found.shape == (4, 2, 63)
    wanted = [[encoded_by_hand(point) for point in row] for row in points.tolist()]
    # 2⁹ p in single precision: its rounding, 2⁹ · 6e-8 · |p|, is in the sine's.
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=2e-4)
    torch.testing.assert_close(nerf.encode(points.double()), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-9)


def test_weights_equal_a_plain_loop():
    density = 3 * random(5, SAMPLES).relu().double()
    depths = nerf.depths_along(torch.zeros(5, 6), jitter=True).double()
    found = nerf.Compositing()(density, depths)
    wanted = [weights_by_hand(*pair) for pair in zip(density.tolist(), depths.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    single = nerf.Compositing()(density.float(), depths.float())
    torch.testing.assert_close(single, found.float(), rtol=0, atol=1e-5)
    assert (single >= 0).all()
    assert (single.sum(-1) <= 1 + 1e-6).all()


def test_an_opaque_sample_hides_what_is_behind_it():
    density, depths = torch.full((2, SAMPLES), 5.0), nerf.depths_along(torch.zeros(2, 6), jitter=False)
    density[0, 0], density[1, :3], density[1, 3] = 1e9, 0, 1e9
    found = nerf.Compositing()(density, depths)
    assert found[0].tolist() == [1.0] + [0.0] * (SAMPLES - 1)
    assert found[1].tolist() == [0.0] * 3 + [1.0] + [0.0] * (SAMPLES - 4)


def test_no_density_is_black():
    model = nerf.TinyNeRF().eval().requires_grad_(False)
    model.layer3.weight[3], model.layer3.bias[3] = 0, -1
    assert not model(random(2, 5, 6)).any()
    assert not nerf.Compositing()(torch.zeros(1, SAMPLES), nerf.depths_along(torch.zeros(1, 6), jitter=False)).any()


def test_a_ray_is_rendered_as_by_a_plain_loop():
    torch.manual_seed(0)
    model = nerf.TinyNeRF().eval().requires_grad_(False).double()
    rays = random(2, 3, 6).double()
    found, depths = model(rays), [NEAR + (number + 0.5) * (FAR - NEAR) / SAMPLES for number in range(SAMPLES)]
    assert found.shape == (2, 3, 3)
    for origin, direction, colour in zip(rays[..., :3].view(-1, 3), rays[..., 3:].view(-1, 3), found.view(-1, 3), strict=True):
        points = [[o + depth * d for o, d in zip(origin.tolist(), direction.tolist(), strict=True)] for depth in depths]
        hidden = torch.tensor([encoded_by_hand(point) for point in points], dtype=torch.float64)
        for layer in (model.layer1, model.layer2):
            hidden = (hidden @ layer.weight.T + layer.bias).clamp_min(0)
        out = (hidden @ model.layer3.weight.T + model.layer3.bias).tolist()
        weights, wanted = weights_by_hand([max(0.0, row[3]) for row in out], depths), [0.0] * 3
        for weight, row in zip(weights, out, strict=True):
            wanted = [sum_ + weight / (1 + math.exp(-value)) for sum_, value in zip(wanted, row[:3], strict=True)]
        torch.testing.assert_close(colour, torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_the_network_is_the_paper_s():
    model = nerf.TinyNeRF()
    assert tuple(model.layer1.weight.shape) == (128, 63)
    assert sum(p.numel() for p in model.parameters()) == (63 * 128 + 128) + (128 * 128 + 128) + (128 * 4 + 4)


def test_depths_are_jittered_in_training_only():
    torch.manual_seed(0)
    model, rays = nerf.TinyNeRF(), random(2, 4, 6)
    assert not torch.equal(model(rays), model(rays))
    model.eval()
    assert torch.equal(model(rays), model(rays))
    drawn, still = nerf.depths_along(rays, jitter=True), nerf.depths_along(rays, jitter=False)
    width = (FAR - NEAR) / SAMPLES
    starts = NEAR + width * torch.arange(SAMPLES)
    torch.testing.assert_close(still, (starts + width / 2).expand(2, 4, SAMPLES))
    assert (drawn >= starts - 1e-6).all()
    assert (drawn <= starts + width + 1e-6).all()
    assert len(((drawn - starts) / width).round(decimals=4).unique()) > 200


def test_gradients_reach_the_first_layer():
    torch.manual_seed(0)
    model = nerf.TinyNeRF().eval()
    (model(random(2, 5, 6)) - 0.5).square().mean().backward()
    assert model.layer1.weight.grad.abs().max() > 0
    assert torch.isfinite(model.layer1.weight.grad).all()


# The task


def test_conditioning_is_what_the_picture_sees(scene_task):
    nerf_task, _ = scene_task
    x = nerf_task.test().x[:2]
    layer_input, activation, weights = random(2, 7, SAMPLES, 3), random(2, 7, SAMPLES, 5, seed=1), random(2, 7, SAMPLES).abs()
    captured = {"layer_input": layer_input, "activation": activation, "compositing": weights}
    found = nerf_task.conditioning(x, nerf_task.test().y[:2], captured)
    assert list(found) == ["layer_input", "activation", "base_output", "camera"]
    for name in ("layer_input", "activation"):
        for view in range(2):
            total, sums = 0.0, [0.0] * captured[name].shape[-1]
            for ray in range(7):
                for sample in range(SAMPLES):
                    weight = float(weights[view, ray, sample])
                    total += weight
                    sums = [a + weight * b for a, b in zip(sums, captured[name][view, ray, sample].tolist(), strict=True)]
            wanted = torch.tensor([value / total for value in sums])
            torch.testing.assert_close(found[name][view], wanted, rtol=1e-4, atol=1e-4)
    wanted = nerf_task.test().y[:2].view(2, SIZE, SIZE, 3).permute(0, 3, 1, 2)
    assert torch.equal(found["base_output"], wanted)
    assert torch.equal(found["camera"], nerf_task.coordinates(x))


def test_views_that_see_nothing_have_finite_conditioning(scene_task):
    nerf_task, _ = scene_task
    captured = {name: torch.ones(1, 4, SAMPLES, 3) for name in ("layer_input", "activation")}
    captured["compositing"] = torch.zeros(1, 4, SAMPLES)
    found = nerf_task.conditioning(nerf_task.test().x[:1], nerf_task.test().y[:1], captured)
    assert not found["layer_input"].any()


def test_coordinates_are_camera_positions(scene_task):
    for split, dataset in (("train", scene_task[0].train()), ("test", scene_task[0].test())):
        wanted = torch.from_numpy(cameras(split, len(dataset))[:, :3, 3]).float()
        torch.testing.assert_close(scene_task[0].coordinates(dataset.x), wanted)


def test_a_view_is_some_rays_with_their_colours(scene_task):
    data = scene_task[0].train()
    x, y = scene_task[0].view(data.x[0], data.y[0], generator("rays"))
    again, _ = scene_task[0].view(data.x[0], data.y[0], generator("rays"))
    assert (x.shape, y.shape) == ((RAYS, 6), (RAYS, 3))
    assert torch.equal(x, again)
    places = (x.unsqueeze(1) == data.x[0]).all(2).nonzero()[:, 1]
    assert len(places.unique()) == RAYS
    assert torch.equal(y, data.y[0][places])


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


def test_pooled_pictures():
    torch.manual_seed(0)
    encoder, values = task.PooledPicture((3, 20, 30), 7), random(2, 3 * 20 * 30)
    assert encoder(values).shape == (2, 7)
    # Places of the 10×10 grid are means of 2×3 pixels.
    grid = values.view(2, 3, 10, 2, 10, 3).mean((3, 5)).flatten(1)
    torch.testing.assert_close(encoder(values), encoder.layer(grid), rtol=1e-4, atol=1e-5)


# The whole example


def panes(example, row, answer="test"):
    """The panes of a strip as they were before they were enlarged, (n, SIZE, SIZE, 3) uint8."""
    with Image.open(example.run / "infer" / answer / "pictures" / f"{row:06d}.png") as image:
        pixels = np.asarray(image)
    times = (len(pixels) - CAPTION) // SIZE
    side = times * SIZE
    return np.stack([pixels[CAPTION:, left : left + side][::times, ::times] for left in range(0, pixels.shape[1], side + GAP)])


def drawn(colours):
    return np.round(255 * np.clip(colours, 0, 1)).astype(np.uint8).reshape(SIZE, SIZE, 3)


def test_the_run_is_whole(ocd, finished_example, told_example):
    assert set(states(ocd, finished_example).values()) == {"done"}
    ocd(finished_example, "verify")
    stages = json.loads(told_example[1].stdout)["stages"]
    assert stages["collect"]["shape"] == [128, 63]
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


def test_the_layer_is_substituted(scene_task):
    _, base = scene_task
    method, reason = choose(base, find_layer(base, LAYER), lambda net, x: net(x), random(2, RAYS, 6))
    assert (method.name, reason) == ("substitution", "")


def test_pictures_of_every_test_view(finished_example, scene_task):
    folder = finished_example.run / "infer" / "test" / "pictures"
    assert sorted(path.name for path in folder.iterdir()) == [f"{row:06d}.png" for row in range(TEST)]
    found, truth = finished_example.predictions(), scene_task[0].test().y
    for row in range(TEST):
        strip = panes(finished_example, row)
        assert len(strip) == 4
        np.testing.assert_array_equal(strip[0], drawn(found["base_output"][row]))
        np.testing.assert_array_equal(strip[2], drawn(found["output"][row]))
        np.testing.assert_array_equal(strip[3], drawn(truth[row].numpy()))
        assert not np.array_equal(strip[0], strip[1])
        # The truth is the picture as it was drawn, on black.
        wanted = bytes_of(picture(cameras("test", TEST)[row], (SIZE, SIZE), focal_of((SIZE, SIZE))), alpha=False)
        assert np.abs(strip[3].astype(int) - wanted).max() <= 2


def test_the_table_has_the_rows_of_the_paper(finished_example, told_example):
    rows = {row["name"]: row["metrics"] for row in told_example[2]["rows"]}
    assert list(rows) == ROWS
    for metrics in rows.values():
        assert {"mse", "psnr", "ssim"} <= metrics.keys()
    assert told_example[2]["metric"] == "mse"
    base, fitted = rows["base"]["mse"]["mean"], rows["overfitted on test"]["mse"]["mean"]
    assert fitted < base
    infer = json.loads((finished_example.run / "infer" / "test" / "manifest.json").read_text())["summary"]["metrics"]
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
    shown = json.loads(ocd(example, "infer", "--json", "--input", example.root / "rays.npz").stdout)
    assert (shown["inputs"], shown["pictures"], shown["metrics"]) == (2, 2, None)
    found, strip = example.predictions("rays"), panes(example, 0, "rays")
    assert len(strip) == 2
    np.testing.assert_array_equal(strip[0], drawn(found["base_output"][0]))
    np.testing.assert_array_equal(strip[1], drawn(found["output"][0]))
    # The base knows the scene: what it renders there is nearer to the truth than black is.
    truth = bytes_of(picture(pose, (SIZE, SIZE), focal), alpha=False) / 255
    assert np.square(found["base_output"][0].reshape(SIZE, SIZE, 3) - truth).mean() < 0.5 * np.square(truth).mean()


def test_collect_goes_on_where_it_was_stopped(ocd, example):
    whole = results(example, "collect")
    shutil.rmtree(example.run / "collect")
    with stopped_at(2):
        ocd(example, "collect", "--quiet", code=4)
    assert len(blocks_of(example)) == 2
    with counted_blocks() as written:
        ocd(example, "collect", "--quiet")
    assert sorted(written) == [2, 3]
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


# Other scenes


def test_an_npz_file(ocd, tmp_path):
    example = make_example(tmp_path, "scene.npz")
    sphere_npz(example.root / "scene.npz", views=32, size=SIZE)
    args = 'task.args={ scene = "scene.npz", rays = 16, base_steps = 5 }'
    shown = ocd(example, "run", "--json", "--until", "collect", "--set", "collect.samples=3", "--set", args)
    summary = json.loads(shown.stdout)["stages"]["collect"]
    assert (summary["samples"], summary["repeats"]) == (3, REPEATS)
    assert "alpha" not in shown.stderr


@pytest.mark.parametrize(
    ("scene", "says"),
    [
        ("nowhere", "nowhere is missing\n  give a folder with transforms_train.json, or an npz file with arrays"),
        ("empty", "empty has no transforms_train.json; JSON files there: none\n"),
    ],
)
def test_a_scene_that_is_not_there(ocd, tmp_path, scene, says):
    example = make_example(tmp_path, scene)
    (example.root / "empty").mkdir()
    shown = ocd(example, "train-base", "--quiet", code=2).stderr
    assert shown.startswith("error: ")
    assert says in shown
    assert not (example.run / "train-base").exists()
