"""Posed views for the TinyNeRF example: geometry, pictures, the forms they come in, and what can be wrong with them."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scene_loading import counts, load_scene, pixel_rays, scene_refusal, scenes
from spheres import ANGLE, SPHERES, bytes_of, cameras, focal_of, picture, pixel, sphere_npz, sphere_scene, trace

from stages.foundation.errors import SettingsError

# Geometry


@pytest.mark.parametrize("size", [(12, 12), (9, 14)])
def test_every_ray_is_seen_at_its_own_pixel_s_centre(size):
    for pose in cameras("train", 5):
        rays = pixel_rays(torch.from_numpy(pose), size, focal_of(size)).numpy()
        assert rays.shape == (size[0] * size[1], 6)
        assert rays.dtype == np.float32
        for depth in (0.5, 7.0):
            points = rays[:, :3] + depth * rays[:, 3:]
            found = [pixel(pose, point, size, focal_of(size)) for point in points]
            wanted = [(column + 0.5, row + 0.5) for row in range(size[0]) for column in range(size[1])]
            np.testing.assert_allclose(found, wanted, atol=1e-4)
            # Along the camera's axis, −z, directions have length 1: the depth of a point is its parameter.
            np.testing.assert_allclose((points - pose[:3, 3]) @ -pose[:3, 2], depth, rtol=1e-5)


def test_the_pixel_of_a_sphere_s_centre_has_the_ray_through_it():
    size = (80, 80)
    for pose in cameras("train", 4):
        rays = pixel_rays(torch.from_numpy(pose), size, focal_of(size)).double().numpy()
        for centre, radius, _ in SPHERES:
            column, row = (int(value) for value in pixel(pose, centre, size, focal_of(size)))
            origin, direction = np.split(rays[row * size[1] + column], 2)
            distance = np.linalg.norm(np.cross(centre - origin, direction)) / np.linalg.norm(direction)
            assert distance < 5.5 / focal_of(size) * 0.5**0.5 < radius


def test_the_centre_ray_looks_at_the_origin():
    for pose in cameras("test", 6):
        origin, direction = pixel_rays(torch.from_numpy(pose), (11, 11), 15.0)[60].split(3)
        torch.testing.assert_close(origin + 4 * direction, torch.zeros(3), atol=1e-6, rtol=0)


def test_what_rays_of_a_loaded_scene_hit_is_what_its_pictures_show(tmp_path):
    scene = load_scene(str(sphere_scene(tmp_path, size=(20, 30))), Path())
    for views in (scene.train, scene.validation, scene.test):
        for rays, colours in zip(views.rays.double().numpy(), views.colours.numpy(), strict=True):
            alone = trace(rays[:, :3], rays[:, 3:])[:, :3]
            # Pictures have nine rays a pixel; where it lies within one sphere, one ray sees the same.
            assert np.median(np.abs(alone - colours)[alone.any(1)]) < 0.02
            assert np.mean(np.abs(alone - colours).max(1) > 0.1) < 0.15


# Pictures


def one_picture(folder, drawn, number=0):
    """Puts a picture (H, W, C) in the place of a training view."""
    Image.fromarray(drawn).save(folder / "train" / f"r_{number}.png")


def test_a_folder_is_read_as_it_stands(tmp_path):
    scene = load_scene("scene", sphere_scene(tmp_path / "scene").parent)
    assert [len(views) for views in (scene.train, scene.validation, scene.test)] == [8, 2, 4]
    assert scene.size == (12, 12)
    assert scene.notes == ("14 pictures have an alpha channel: composited on black",)
    for split, views in (("train", scene.train), ("validation", scene.validation), ("test", scene.test)):
        assert views.rays.dtype == views.colours.dtype == torch.float32
        for pose, rays, colours in zip(cameras(split, len(views)), views.rays, views.colours, strict=True):
            torch.testing.assert_close(rays, pixel_rays(torch.from_numpy(pose), (12, 12), focal_of((12, 12))))
            drawn = bytes_of(picture(pose, (12, 12), focal_of((12, 12))), alpha=True).astype(np.float64) / 255
            np.testing.assert_allclose(colours.numpy(), (drawn[..., :3] * drawn[..., 3:]).reshape(-1, 3), atol=1e-7)


def test_without_alpha_there_is_no_note_and_the_same_to_see(tmp_path):
    with_alpha = load_scene(str(sphere_scene(tmp_path / "a")), tmp_path)
    without = load_scene(str(sphere_scene(tmp_path / "b", alpha=False, validation=0)), tmp_path)
    assert without.notes == ()
    assert without.validation is None
    assert (without.train.colours - with_alpha.train.colours).abs().max() < 2 / 255


def test_larger_pictures_are_averaged_after_compositing(tmp_path):
    folder = sphere_scene(tmp_path, train=1, validation=0, test=1, size=16)
    drawn = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
    one_picture(folder, drawn)
    scene = load_scene(str(folder), tmp_path, size=4)
    assert scene.size == (4, 4)
    values = drawn.astype(np.float64) / 255
    wanted = (values[..., :3] * values[..., 3:]).reshape(4, 4, 4, 4, 3).mean((1, 3))
    np.testing.assert_allclose(scene.train.colours[0].numpy(), wanted.reshape(-1, 3), atol=1e-6)
    torch.testing.assert_close(
        scene.train.rays[0], pixel_rays(torch.from_numpy(cameras("train", 1)[0]), (4, 4), 0.5 * 4 / np.tan(0.5 * ANGLE))
    )


@pytest.mark.parametrize(
    ("shape", "size", "wanted"), [((10, 10), 4, (4, 4)), ((12, 16), 4, (3, 4)), ((16, 10), 6, (6, 3)), ((1, 9), 3, (1, 3))]
)
def test_averages_are_those_of_areas(shape, size, wanted):
    drawn = np.random.default_rng(1).random((*shape, 3))
    # Each pixel as size × size equal ones, so that the squares end between pixels.
    scale = max(shape)
    fine = np.kron(drawn, np.ones((size, size, 1)))
    left = [fine.shape[axis] - scale * wanted[axis] for axis in (0, 1)]
    if min(left) >= 0:
        fine = fine[left[0] // 2 :, left[1] // 2 :][: scale * wanted[0], : scale * wanted[1]]
        fine = fine.reshape(wanted[0], scale, wanted[1], scale, 3).mean((1, 3))
    else:
        fine = fine.reshape(1, -1, wanted[1], scale, 3).mean((1, 3))
    np.testing.assert_allclose(scenes.shrink(drawn, size), fine, atol=1e-6)


def test_a_shorter_side_that_does_not_divide_is_cut_not_squeezed(tmp_path):
    folder = sphere_scene(tmp_path, train=1, validation=0, test=1, size=(16, 10))
    scene = load_scene(str(folder), tmp_path, size=6)
    assert scene.size == (6, 3)
    focal = focal_of((16, 10)) * 6 / 16
    torch.testing.assert_close(scene.train.rays[0], pixel_rays(torch.from_numpy(cameras("train", 1)[0]), (6, 3), focal))


def test_grey_palette_and_16_bit_pictures(tmp_path):
    folder = sphere_scene(tmp_path, train=6, validation=0, test=1, size=2, alpha=False)
    grey = np.array([[0, 51], [102, 255]], np.uint8)
    alpha = np.array([[255, 255], [0, 51]], np.uint8)
    palette = Image.fromarray(grey).convert("P")
    one_picture(folder, grey, 0)
    one_picture(folder, grey.astype(np.uint16) * 257, 1)
    Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]).save(folder / "train" / "r_2.png")
    palette.save(folder / "train" / "r_3.png")
    palette.save(folder / "train" / "r_4.png", transparency=255)
    Image.fromarray(grey > 51).save(folder / "train" / "r_5.png")
    scene = load_scene(str(folder), tmp_path)
    values = grey.reshape(-1, 1) / 255
    wanted = [values, values, values * alpha.reshape(-1, 1) / 255, values, values * (values < 1), 1.0 * (values > 0.2)]
    for colours, one in zip(scene.train.colours.numpy(), wanted, strict=True):
        np.testing.assert_allclose(colours, np.repeat(one, 3, 1), atol=1e-6)
    assert scene.notes == ("2 pictures have an alpha channel: composited on black",)


def test_without_pillow_it_says_what_to_install(tmp_path, monkeypatch):
    folder = sphere_scene(tmp_path, train=1, test=1)
    monkeypatch.setitem(sys.modules, "PIL", None)
    message, hint = scene_refusal(str(folder), tmp_path, kind=SettingsError)
    assert message == "pictures are read with Pillow, which is not installed"
    assert 'pip install "torch-ocd[examples]"' in hint


# Which views


def test_which_views_are_taken(tmp_path):
    folder = sphere_scene(tmp_path, train=8, validation=8, test=23, size=2)
    whole = load_scene(str(folder), tmp_path, validation_views=8, test_views=23)
    scene = load_scene(str(folder), tmp_path)
    assert [len(views) for views in (scene.train, scene.validation, scene.test)] == [8, 6, 20]
    assert scene.test.rays.equal(whole.test.rays[[number * 23 // 20 for number in range(20)]])
    assert scene.validation.colours.equal(whole.validation.colours[:6])
    scene = load_scene(str(folder), tmp_path, train_views=3, validation_views=1, test_views=4)
    assert scene.train.rays.equal(whole.train.rays[:3])
    assert scene.validation.rays.equal(whole.validation.rays[:1])
    assert scene.test.rays.equal(whole.test.rays[[0, 5, 11, 17]])
    assert scene.notes == ("8 pictures have an alpha channel: composited on black",)
    one = load_scene(str(sphere_scene(tmp_path / "one", train=1, validation=0, test=1, alpha=False)), tmp_path)
    assert (len(one.train), one.validation, len(one.test)) == (1, None, 1)


def test_more_views_than_there_are(tmp_path):
    folder = str(sphere_scene(tmp_path, train=12, validation=0, test=1, size=2))
    assert scene_refusal(folder, tmp_path, train_views=100) == (
        "the scene has 12 training views, 100 were asked for",
        "set task.args.train_views to at most 12, or leave it out",
    )
    assert scene_refusal(folder, tmp_path, test_views=2)[0] == "the scene has 1 test view, 2 were asked for"
    assert scene_refusal(folder, tmp_path, validation_views=1) == (
        "the scene has 0 validation views, 1 was asked for",
        "leave task.args.validation_views out",
    )


@pytest.mark.parametrize("name", ["size", "train_views", "validation_views", "test_views"])
@pytest.mark.parametrize("value", [0, -3, 2.5, True, "all"])
def test_numbers_that_are_none(name, value, tmp_path):
    assert scene_refusal(None, tmp_path, kind=SettingsError, **{name: value}) == (
        f"task.args.{name} is {value!r}",
        "it must be a whole number, 1 or more, or left out",
    )


# npz files


def test_an_npz_file_without_a_test_part(tmp_path):
    scene = load_scene("a.npz", sphere_npz(tmp_path / "a.npz", views=40, size=4).parent)
    assert counts(scene) == (14, 6, 20)
    assert scene.size == (4, 4)
    poses = torch.from_numpy(cameras("train", 40)).float()
    for views, first in ((scene.train, 0), (scene.validation, 14), (scene.test, 20)):
        rays = torch.stack([pixel_rays(pose, (4, 4), focal_of((4, 4))) for pose in poses[first : first + len(views)]])
        torch.testing.assert_close(views.rays, rays)
    shown = bytes_of(picture(cameras("train", 40)[39], (4, 4), focal_of((4, 4))), alpha=False)
    np.testing.assert_allclose(scene.test.colours[19].numpy(), shown.reshape(-1, 3) / 255, atol=1e-7)
    path = sphere_npz(tmp_path / "b.npz", views=31, size=2)
    assert scene_refusal(str(path), tmp_path) == (
        f"{path} has 31 images and no test part, at least 32 are needed",
        "the last 20 are for testing, 6 for validation; or add test_images and test_poses",
    )


def test_an_npz_file_with_a_test_part(tmp_path):
    assert counts(load_scene(str(sphere_npz(tmp_path / "a.npz", views=103, test=25, size=2)), tmp_path)) == (100, 3, 25)
    scene = load_scene(str(sphere_npz(tmp_path / "b.npz", views=5, test=3, size=2)), tmp_path)
    assert counts(scene) == (5, 0, 3)
    assert scene.validation is None


def test_an_npz_file_s_pictures_may_be_bytes_have_alpha_and_be_large(tmp_path):
    draw = np.random.default_rng(2).integers(0, 256, (4, 8, 8, 4), np.uint8)
    named = {"views": 4, "test": 1, "size": 8, "alpha": True}
    scene = load_scene(str(sphere_npz(tmp_path / "a.npz", **named, images=draw)), tmp_path, size=2)
    values = draw.astype(np.float64) / 255
    wanted = (values[..., :3] * values[..., 3:]).reshape(4, 2, 4, 2, 4, 3).mean((2, 4)).reshape(4, 4, 3)
    np.testing.assert_allclose(scene.train.colours.numpy(), wanted, atol=1e-6)
    torch.testing.assert_close(
        scene.train.rays[1], pixel_rays(torch.from_numpy(cameras("train", 4)[1]), (2, 2), focal_of((8, 8)) / 4)
    )
    assert scene.notes == ("5 pictures have an alpha channel: composited on black",)


# Blender-format folders
