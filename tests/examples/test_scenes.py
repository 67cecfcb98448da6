"""Posed views for the TinyNeRF example: geometry, pictures, the forms they come in, and what can be wrong with them."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from serving import serving
from spheres import ANGLE, SPHERES, bytes_of, cameras, focal_of, picture, pixel, sphere_npz, sphere_scene, trace

from stages.foundation.errors import DataError, OcdError, SettingsError
from stages.tasks.fetch import cache_folder

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parent.parent.parent / "examples" / "tinynerf")
    import scenes
    from posed_pictures import ARRAYS, FORM, LAYOUTS, POSE
    from scenes import load_scene, pixel_rays

# Taken before the tests' own fixture hides it.
OCD_DATA = os.environ.get("OCD_DATA")


def refusal(*args, kind=DataError, **named):
    """The message and hint with which a scene is refused."""
    with pytest.raises(kind) as error:
        load_scene(*args, **named)
    return error.value.message, error.value.hint


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
    message, hint = refusal(str(folder), tmp_path, kind=SettingsError)
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
    assert refusal(folder, tmp_path, train_views=100) == (
        "the scene has 12 training views, 100 were asked for",
        "set task.args.train_views to at most 12, or leave it out",
    )
    assert refusal(folder, tmp_path, test_views=2)[0] == "the scene has 1 test view, 2 were asked for"
    assert refusal(folder, tmp_path, validation_views=1) == (
        "the scene has 0 validation views, 1 was asked for",
        "leave task.args.validation_views out",
    )


@pytest.mark.parametrize("name", ["size", "train_views", "validation_views", "test_views"])
@pytest.mark.parametrize("value", [0, -3, 2.5, True, "all"])
def test_numbers_that_are_none(name, value, tmp_path):
    assert refusal(None, tmp_path, kind=SettingsError, **{name: value}) == (
        f"task.args.{name} is {value!r}",
        "it must be a whole number, 1 or more, or left out",
    )


# npz files


def counts(scene):
    return len(scene.train), len(scene.validation or ()), len(scene.test)


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
    assert refusal(str(path), tmp_path) == (
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


RANGE = "expected uint8, or floats in [0, 1]"
GOOD = np.full((32, 2, 2, 3), 0.5, np.float32)
STILL = np.tile(np.eye(4), (32, 1, 1))


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("arrays", "message", "hint"),
    [
        ({"images": None}, " has no array images; it has focal, poses", ARRAYS),
        ({"images": GOOD[0]}, ": images has shape (2, 2, 3)", ARRAYS),
        ({"images": GOOD[..., :1]}, ": images has shape (32, 2, 2, 1)", ARRAYS),
        ({"images": GOOD[:0]}, ": images has shape (0, 2, 2, 3)", ARRAYS),
        ({"images": GOOD.astype(int)}, ": images has dtype int64", RANGE),
        (
            {"images": changed(GOOD, (7, 1), 1.5)},
            ": images[7] has values from 0.5 to 1.5",
            RANGE,
        ),
        ({"images": changed(GOOD, (7, 1), -1)}, ": images[7] has values from -1 to 0.5", RANGE),
        ({"images": changed(GOOD, (3, 0), np.nan)}, ": images[3] is not finite", RANGE),
        ({"images": changed(GOOD, 31, np.inf)}, ": images[31] is not finite", RANGE),
        ({"poses": STILL[:9]}, ": poses has shape (9, 4, 4) and dtype float64, for 32 pictures", ARRAYS),
        ({"poses": STILL[:, :3]}, ": poses has shape (32, 3, 4) and dtype float64, for 32 pictures", ARRAYS),
        ({"poses": STILL.astype(str)}, ": poses has shape (32, 4, 4) and dtype <U32, for 32 pictures", ARRAYS),
        (
            {"poses": changed(STILL, (4, 0, 3), np.nan)},
            ": poses[4] is not a rigid motion: it has entries that are not finite",
            POSE,
        ),
        ({"poses": changed(STILL, (4, 3), 1)}, ": poses[4] is not a rigid motion: its last row is 1 1 1 1", POSE),
        (
            {"poses": changed(STILL, (5, 2, 2), -1)},
            ": poses[5] is not a rigid motion: its columns have lengths 1, 1, 1, products 0, 0, 0 with one another, "
            "determinant -1",
            POSE,
        ),
        (
            {"poses": changed(STILL, (6, 0, 1), 0.75)},
            ": poses[6] is not a rigid motion: its columns have lengths 1, 1.25, 1, products 0.75, 0, 0 with one another, "
            "determinant 1",
            POSE,
        ),
        ({"focal": 0.0}, ": focal is 0.0", "expected one positive number, the focal length in pixels"),
        ({"focal": np.nan}, ": focal is nan", "expected one positive number, the focal length in pixels"),
        ({"focal": [1.0, 2.0]}, ": focal is [1.0, 2.0]", "expected one positive number, the focal length in pixels"),
        ({"focal": "far"}, ": focal is far", "expected one positive number, the focal length in pixels"),
        ({"test_poses": STILL}, " has no array test_images; it has focal, images, poses, test_poses", ARRAYS),
        (
            {"test_poses": STILL, "test_images": np.zeros((32, 2, 2, 3)) + 2},
            ": test_images[0] has values from 2 to 2",
            RANGE,
        ),
        (
            {"test_poses": 2 * STILL, "test_images": GOOD},
            ": test_poses[0] is not a rigid motion: its last row is 0 0 0 2",
            POSE,
        ),
        (
            {"test_poses": STILL[:1], "test_images": np.zeros((1, 3, 5, 3))},
            ": test_images[0] has 5×3 pixels, {path}: images[0] has 2×2",
            "all pictures of a scene must have one size (width × height)",
        ),
        (
            {"images": np.array([None, 1])},
            " is not an npz file that can be read: it holds no plain arrays",
            LAYOUTS,
        ),
    ],
)
def test_bad_arrays(arrays, message, hint, tmp_path):
    path = sphere_npz(tmp_path / "a.npz", size=2, **arrays)
    assert refusal(str(path), tmp_path) == (str(path) + message.replace("{path}", str(path)), hint)


def test_small_errors_of_a_rotation_are_let_pass(tmp_path):
    poses = changed(STILL, (slice(None), 0, 0), 1.0004)
    assert counts(load_scene(str(sphere_npz(tmp_path / "a.npz", size=2, poses=poses)), tmp_path)) == (6, 6, 20)


def test_sources_that_are_none(tmp_path):
    assert refusal("away", tmp_path) == (f"{tmp_path / 'away'} is missing", LAYOUTS)
    np.save(tmp_path / "one.npy", GOOD)
    for name, content in (("text.npz", b"<html>not found</html>"), ("empty.npz", b"")):
        (tmp_path / name).write_bytes(content)
    for name in ("one.npy", "text.npz", "empty.npz"):
        message, hint = refusal(name, tmp_path)
        assert message.startswith(f"{tmp_path / name} is not an npz file that can be read: ")
        assert hint == LAYOUTS
    (tmp_path / "transforms.json").write_text("{}")
    hint = "a Blender-format scene has transforms_train.json and transforms_test.json beside its folders of pictures"
    assert refusal(str(tmp_path), tmp_path) == (
        f"{tmp_path} has no transforms_train.json; JSON files there: transforms.json",
        hint,
    )
    folder = sphere_scene(tmp_path / "scene", test=0)
    assert refusal(str(folder), tmp_path) == (
        f"{folder} has no transforms_test.json; JSON files there: transforms_train.json, transforms_val.json",
        hint,
    )
    (tmp_path / "none").mkdir()
    assert refusal("none", tmp_path)[0] == f"{tmp_path / 'none'} has no transforms_train.json; JSON files there: none"


@pytest.mark.parametrize("name", ["a.npz", "train/r_0.png", "transforms_train.json"])
def test_damaged_bytes_give_a_scene_or_a_refusal(name, tmp_path):
    folder = sphere_scene(tmp_path, train=1, validation=0, test=1, size=4)
    source = str(sphere_npz(tmp_path / "a.npz", size=1) if name == "a.npz" else folder)
    path, draw = tmp_path / name, np.random.default_rng(3)
    good = path.read_bytes()
    load_scene(source, tmp_path)
    for _ in range(60):
        bad = bytearray(good)
        for place in draw.integers(0, len(bad), 2):
            bad[place] = draw.integers(256)
        path.write_bytes(bad[: draw.integers(len(bad))] if draw.random() < 0.3 else bad)
        try:
            scene = load_scene(source, tmp_path)
            assert torch.isfinite(scene.train.rays).all()
        except OcdError as error:
            assert error.hint


# Blender-format folders

RADIANS = "expected the horizontal angle of view in radians, between 0 and π"
WANTED = f"expected {FORM}"
INSIDE = "give it relative to the scene's folder, as ./train/r_0"


def scaled(described):
    matrix = described["frames"][1]["transform_matrix"]
    described["frames"][1]["transform_matrix"] = [[2 * value for value in row] for row in matrix[:3]] + matrix[3:]


def at(*keys, value=None, drop=False):
    """A change of what is under these keys."""

    def change(described):
        for key in keys[:-1]:
            described = described[key]
        if drop:
            del described[keys[-1]]
        else:
            described[keys[-1]] = value

    return change


FRAME = ("frames", 1)
MATRIX = (*FRAME, "transform_matrix")


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (at("camera_angle_x", drop=True), ": camera_angle_x is missing", RADIANS),
        (at("camera_angle_x", value=0), ": camera_angle_x is 0", RADIANS),
        (at("camera_angle_x", value=39.6), ": camera_angle_x is 39.6", RADIANS),
        (at("camera_angle_x", value="0.69"), ": camera_angle_x is '0.69'", RADIANS),
        (at("camera_angle_x", value=float("nan")), ": camera_angle_x is nan", RADIANS),
        (at("frames", drop=True), " has no frames", WANTED),
        (at("frames", value=[]), " has no frames", WANTED),
        (at("frames", value={"a": 1}), " has no frames", WANTED),
        (at("frames", 1, value=3), ": frames[1] has no file_path", WANTED),
        (at(*FRAME, "file_path", drop=True), ": frames[1] has no file_path", WANTED),
        (at(*FRAME, "file_path", value="../r_1"), ": file_path ../r_1 leaves the folder", INSIDE),
        (at(*FRAME, "file_path", value="./a/../../x/r_1.png"), ": file_path ./a/../../x/r_1.png leaves the folder", INSIDE),
        (at(*FRAME, "file_path", value="/etc/r_1"), ": file_path /etc/r_1 leaves the folder", INSIDE),
        (at(*MATRIX, drop=True), ": transform_matrix of ./train/r_1 is missing", WANTED),
        (at(*MATRIX, 3, drop=True), ": transform_matrix of ./train/r_1 is not 4×4 numbers", WANTED),
        (at(*MATRIX, 2, 1, drop=True), ": transform_matrix of ./train/r_1 is not 4×4 numbers", WANTED),
        (at(*MATRIX, 2, 1, value="1"), ": transform_matrix of ./train/r_1 is not 4×4 numbers", WANTED),
        (
            at(*MATRIX, 2, 1, value=10**400),
            ": transform_matrix of ./train/r_1 is not a rigid motion: it has entries that are not finite",
            POSE,
        ),
        (
            at(*MATRIX, 3, 3, value=0),
            ": transform_matrix of ./train/r_1 is not a rigid motion: its last row is 0 0 0 0",
            POSE,
        ),
        (
            scaled,
            ": transform_matrix of ./train/r_1 is not a rigid motion: its columns have lengths 2, 2, 2, "
            "products 0, 0, 0 with one another, determinant 8",
            POSE,
        ),
    ],
)
def test_bad_transforms(change, message, hint, tmp_path):
    path = sphere_scene(tmp_path, train=2, validation=0, test=1, size=2) / "transforms_train.json"
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))
    assert refusal(str(tmp_path), tmp_path) == (str(path) + message, hint)


@pytest.mark.parametrize("name", ["train", "test", "val"])
def test_every_transforms_file_is_checked(name, tmp_path):
    path = sphere_scene(tmp_path, train=1, validation=1, test=1, size=2) / f"transforms_{name}.json"
    path.write_text("{")
    message, hint = refusal(str(tmp_path), tmp_path)
    assert message.startswith(f"{path} is not readable as JSON: Expecting property name")
    assert hint == WANTED
    for content in (b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(content)
        assert refusal(str(tmp_path), tmp_path)[0].startswith(f"{path} is not readable as JSON: ")
    path.write_text("[1, 2]")
    assert refusal(str(tmp_path), tmp_path) == (f"{path}: camera_angle_x is missing", RADIANS)


def test_bad_pictures(tmp_path):
    folder = sphere_scene(tmp_path, train=3, validation=0, test=2, size=(3, 4))
    path = folder / "train" / "r_1.png"
    good = path.read_bytes()
    path.unlink()
    assert refusal(str(folder), tmp_path) == (
        f"{path} is missing",
        "transforms_train.json names it; a file_path without a suffix means .png",
    )
    for content in (b"", b"no picture", good[: len(good) // 2]):
        path.write_bytes(content)
        message, hint = refusal(str(folder), tmp_path)
        assert message.startswith(f"{path} is not a picture that can be read: ")
        assert hint == "PNG and JPEG are; write it again"
    Image.fromarray(np.full((3, 4), 1 << 20, np.int32)).save(path.with_suffix(".tif"))
    transforms = folder / "transforms_train.json"
    transforms.write_text(transforms.read_text().replace("r_1", "r_1.tif"))
    assert "its values have neither 8 nor 16 bits (mode I)" in refusal(str(folder), tmp_path)[0]


@pytest.mark.parametrize(("name", "called"), [("train/r_2", "./train/r_2"), ("test/r_1", "./test/r_1")])
def test_pictures_of_several_sizes(name, called, tmp_path):
    folder = sphere_scene(tmp_path, train=3, validation=0, test=2, size=(3, 4))
    Image.new("RGB", (5, 3)).save(folder / f"{name}.png")
    assert refusal(str(folder), tmp_path) == (
        f"{called} has 5×3 pixels, ./train/r_0 has 4×3",
        "all pictures of a scene must have one size (width × height)",
    )


def test_other_suffixes_and_links_inside_the_folder(tmp_path):
    folder = sphere_scene(tmp_path / "scene", train=2, validation=0, test=1, size=2, alpha=False)
    wanted = load_scene(str(folder), tmp_path)
    (folder / "train").rename(tmp_path / "elsewhere")
    (folder / "pictures").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "r_1.png").rename(tmp_path / "elsewhere" / "r_1.PNG")
    path = folder / "transforms_train.json"
    text = path.read_text().replace("./train/r_0", str(folder / "pictures/r_0"))
    path.write_text(text.replace("./train/r_1", "pictures/r_1.PNG"))
    assert load_scene(str(folder), tmp_path).train.colours.equal(wanted.train.colours)


# The Lego scene


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OCD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / scenes.LEGO


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves a scene at /good and half of it at /short; the example looks there, at /good unless told otherwise."""
    content = sphere_npz(tmp_path / "served.npz", size=2).read_bytes()
    with serving({"/good": content, "/short": content, "/page": b"<html>welcome</html>"}) as (url, requests):

        def look(*paths):
            monkeypatch.setattr(scenes, "LEGO_URLS", [f"{url}{path}" for path in paths])
            requests.clear()
            return requests

        look("/good")
        yield look


def test_the_lego_scene_is_downloaded_once(cache, server, tmp_path):
    requests = server("/short", "/good")
    assert counts(load_scene(None, tmp_path)) == (6, 6, 20)
    assert counts(load_scene(None, tmp_path)) == (6, 6, 20)
    assert requests == ["/short", "/good"]
    cache.write_bytes(sphere_npz(tmp_path / "other.npz", size=2, views=33).read_bytes())
    message, hint = refusal(None, tmp_path)
    assert message.startswith(f"{cache} has changed: its sha256 is ")
    assert hint == f"delete it and {cache}.sha256 to download it again"
    assert requests == ["/short", "/good"]


def test_a_truncated_download_or_another_page_is_refused(cache, server, tmp_path):
    server("/short")
    assert "IncompleteRead" in refusal(None, tmp_path)[0]
    assert not cache.exists()
    server("/page")
    message, hint = refusal(None, tmp_path)
    assert message == f"{cache} is not an npz file that can be read: it holds no plain arrays"
    assert hint == f"delete it and {cache}.sha256 to download it again"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_inside_the_file_is_found(save, tmp_path, monkeypatch):
    monkeypatch.setenv("OCD_DATA", str(tmp_path))
    path = sphere_npz(tmp_path / scenes.LEGO, size=4)
    save(path, **np.load(path))
    load_scene(None, tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    message, hint = refusal(None, tmp_path)
    assert message.startswith(f"{path} is not an npz file that can be read: ")
    assert hint == "replace it, or unset OCD_DATA to download it"


def test_a_checksum_may_be_demanded(cache, server, tmp_path, monkeypatch):
    wrong = "0" * 64
    assert "/good: SHA256 hash of downloaded file" in refusal(None, tmp_path, sha256=wrong)[0]
    load_scene(None, tmp_path)
    right = Path(f"{cache}.sha256").read_text().split()[0]
    requests = server("/good")
    load_scene(None, tmp_path, sha256=right.upper())
    assert requests == []
    sphere_npz(tmp_path / scenes.LEGO, size=3)
    monkeypatch.setenv("OCD_DATA", str(tmp_path))
    assert load_scene(None, tmp_path).size == (3, 3)
    assert "has another sha256 than expected" in refusal(None, tmp_path, sha256=right)[0]
    assert refusal("a.npz", tmp_path, sha256=right, kind=SettingsError) == (
        "a sha256 is set, which is for the downloaded scene, but the source is a.npz",
        "leave it out",
    )


def test_the_real_lego_scene(tmp_path, monkeypatch):
    if OCD_DATA:
        monkeypatch.setenv("OCD_DATA", OCD_DATA)
    if not (OCD_DATA and (Path(OCD_DATA) / scenes.LEGO).is_file()) and not (cache_folder() / scenes.LEGO).is_file():
        pytest.skip("the Lego scene is neither in OCD_DATA nor downloaded")
    scene = load_scene(None, tmp_path)
    assert counts(scene) in {(100, 6, 20), (80, 6, 20)}  # with a test part of its own, and as published
    assert scene.size == (100, 100)
    assert scene.notes == ()
    # Cameras stand 4.03 from the origin and look at it; most of a picture is background.
    for views in (scene.train, scene.validation, scene.test):
        middle = views.rays[:, [4949, 4950, 5049, 5050]].mean(1)
        distance = middle[:, :3].norm(dim=1)
        torch.testing.assert_close(distance, torch.full_like(distance, 4.03), atol=0.01, rtol=0)
        torch.testing.assert_close(middle[:, 3:], -middle[:, :3] / distance[:, None], atol=1e-3, rtol=0)
        assert 0.5 < (views.colours == 0).all(-1).float().mean() < 0.8
