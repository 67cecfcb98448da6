"""TinyNeRF's rendering and what its task makes of it, against plain loops."""

import itertools
import math

import pytest
import torch
from networks import random
from spheres import cameras
from tinynerf import FAR, NEAR, RAYS, SAMPLES, SIZE, make_scene, nerf, task

from stages.foundation.seeds import generator


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


def test_pooled_pictures():
    torch.manual_seed(0)
    encoder, values = task.PooledPicture((3, 20, 30), 7), random(2, 3 * 20 * 30)
    assert encoder(values).shape == (2, 7)
    # Places of the 10×10 grid are means of 2×3 pixels.
    grid = values.view(2, 3, 10, 2, 10, 3).mean((3, 5)).flatten(1)
    torch.testing.assert_close(encoder(values), encoder.layer(grid), rtol=1e-4, atol=1e-5)


# The task


@pytest.fixture(scope="module")
def nerf_task(tmp_path_factory):
    return task.NerfTask(str(make_scene(tmp_path_factory.mktemp("nerf") / "scene")), rays=RAYS)


def test_conditioning_is_what_the_picture_sees(nerf_task):
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


def test_views_that_see_nothing_have_finite_conditioning(nerf_task):
    captured = {name: torch.ones(1, 4, SAMPLES, 3) for name in ("layer_input", "activation")}
    captured["compositing"] = torch.zeros(1, 4, SAMPLES)
    found = nerf_task.conditioning(nerf_task.test().x[:1], nerf_task.test().y[:1], captured)
    assert not found["layer_input"].any()


def test_coordinates_are_camera_positions(nerf_task):
    for split, dataset in (("train", nerf_task.train()), ("test", nerf_task.test())):
        wanted = torch.from_numpy(cameras(split, len(dataset))[:, :3, 3]).float()
        torch.testing.assert_close(nerf_task.coordinates(dataset.x), wanted)


def test_a_view_is_some_rays_with_their_colours(nerf_task):
    data = nerf_task.train()
    x, y = nerf_task.view(data.x[0], data.y[0], generator("rays"))
    again, _ = nerf_task.view(data.x[0], data.y[0], generator("rays"))
    assert (x.shape, y.shape) == ((RAYS, 6), (RAYS, 3))
    assert torch.equal(x, again)
    places = (x.unsqueeze(1) == data.x[0]).all(2).nonzero()[:, 1]
    assert len(places.unique()) == RAYS
    assert torch.equal(y, data.y[0][places])
