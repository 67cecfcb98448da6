"""npz files and Blender-format folders of posed views: the forms they come in, and what can be wrong with them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scene_loading import ARRAYS, FORM, LAYOUTS, POSE, counts, load_scene, scene_refusal
from spheres import sphere_npz, sphere_scene

from stages.foundation.errors import OcdError

RANGE, NOT_RIGID = "expected uint8, or floats in [0, 1]", "is not a rigid motion"
FOCAL = "expected one positive number, the focal length in pixels"
ONE_SIZE = "all pictures of a scene must have one size (width × height)"
GOOD = np.full((32, 2, 2, 3), 0.5, np.float32)
STILL = np.tile(np.eye(4), (32, 1, 1))


def columns(lengths, products, determinant):
    told = f"its columns have lengths {lengths}, products {products} with one another, determinant {determinant}"
    return f"{NOT_RIGID}: {told}"


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
        ({"images": changed(GOOD, (7, 1), 1.5)}, ": images[7] has values from 0.5 to 1.5", RANGE),
        ({"images": changed(GOOD, (7, 1), -1)}, ": images[7] has values from -1 to 0.5", RANGE),
        ({"images": changed(GOOD, (3, 0), np.nan)}, ": images[3] is not finite", RANGE),
        ({"images": changed(GOOD, 31, np.inf)}, ": images[31] is not finite", RANGE),
        ({"poses": STILL[:9]}, ": poses has shape (9, 4, 4) and dtype float64, for 32 pictures", ARRAYS),
        ({"poses": STILL[:, :3]}, ": poses has shape (32, 3, 4) and dtype float64, for 32 pictures", ARRAYS),
        ({"poses": STILL.astype(str)}, ": poses has shape (32, 4, 4) and dtype <U32, for 32 pictures", ARRAYS),
        ({"poses": changed(STILL, (4, 0, 3), np.nan)}, f": poses[4] {NOT_RIGID}: it has entries that are not finite", POSE),
        ({"poses": changed(STILL, (4, 3), 1)}, f": poses[4] {NOT_RIGID}: its last row is 1 1 1 1", POSE),
        ({"poses": changed(STILL, (5, 2, 2), -1)}, ": poses[5] " + columns("1, 1, 1", "0, 0, 0", -1), POSE),
        ({"poses": changed(STILL, (6, 0, 1), 0.75)}, ": poses[6] " + columns("1, 1.25, 1", "0.75, 0, 0", 1), POSE),
        ({"focal": 0.0}, ": focal is 0.0", FOCAL),
        ({"focal": np.nan}, ": focal is nan", FOCAL),
        ({"focal": [1.0, 2.0]}, ": focal is [1.0, 2.0]", FOCAL),
        ({"focal": "far"}, ": focal is far", FOCAL),
        ({"test_poses": STILL}, " has no array test_images; it has focal, images, poses, test_poses", ARRAYS),
        ({"test_poses": STILL, "test_images": np.zeros((32, 2, 2, 3)) + 2}, ": test_images[0] has values from 2 to 2", RANGE),
        ({"test_poses": 2 * STILL, "test_images": GOOD}, f": test_poses[0] {NOT_RIGID}: its last row is 0 0 0 2", POSE),
        (
            {"test_poses": STILL[:1], "test_images": np.zeros((1, 3, 5, 3))},
            ": test_images[0] has 5×3 pixels, {path}: images[0] has 2×2",
            ONE_SIZE,
        ),
        ({"images": np.array([None, 1])}, " is not an npz file that can be read: it holds no plain arrays", LAYOUTS),
    ],
)
def test_bad_arrays(arrays, message, hint, tmp_path):
    path = sphere_npz(tmp_path / "a.npz", size=2, **arrays)
    assert scene_refusal(str(path), tmp_path) == (str(path) + message.replace("{path}", str(path)), hint)


def test_small_errors_of_a_rotation_are_let_pass(tmp_path):
    poses = changed(STILL, (slice(None), 0, 0), 1.0004)
    assert counts(load_scene(str(sphere_npz(tmp_path / "a.npz", size=2, poses=poses)), tmp_path)) == (6, 6, 20)


def test_sources_that_are_none(tmp_path):
    assert scene_refusal("away", tmp_path) == (f"{tmp_path / 'away'} is missing", LAYOUTS)
    np.save(tmp_path / "one.npy", GOOD)
    for name, content in (("text.npz", b"<html>not found</html>"), ("empty.npz", b"")):
        (tmp_path / name).write_bytes(content)
    for name in ("one.npy", "text.npz", "empty.npz"):
        message, hint = scene_refusal(name, tmp_path)
        assert message.startswith(f"{tmp_path / name} is not an npz file that can be read: ")
        assert hint == LAYOUTS
    (tmp_path / "transforms.json").write_text("{}")
    hint = "a Blender-format scene has transforms_train.json and transforms_test.json beside its folders of pictures"
    assert scene_refusal(str(tmp_path), tmp_path) == (
        f"{tmp_path} has no transforms_train.json; JSON files there: transforms.json",
        hint,
    )
    folder = sphere_scene(tmp_path / "scene", test=0)
    assert scene_refusal(str(folder), tmp_path) == (
        f"{folder} has no transforms_test.json; JSON files there: transforms_train.json, transforms_val.json",
        hint,
    )
    (tmp_path / "none").mkdir()
    assert scene_refusal("none", tmp_path)[0] == f"{tmp_path / 'none'} has no transforms_train.json; JSON files there: none"


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
SECOND = ": transform_matrix of ./train/r_1"


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
        (at(*MATRIX, drop=True), f"{SECOND} is missing", WANTED),
        (at(*MATRIX, 3, drop=True), f"{SECOND} is not 4×4 numbers", WANTED),
        (at(*MATRIX, 2, 1, drop=True), f"{SECOND} is not 4×4 numbers", WANTED),
        (at(*MATRIX, 2, 1, value="1"), f"{SECOND} is not 4×4 numbers", WANTED),
        (at(*MATRIX, 2, 1, value=10**400), f"{SECOND} {NOT_RIGID}: it has entries that are not finite", POSE),
        (at(*MATRIX, 3, 3, value=0), f"{SECOND} {NOT_RIGID}: its last row is 0 0 0 0", POSE),
        (scaled, f"{SECOND} " + columns("2, 2, 2", "0, 0, 0", 8), POSE),
    ],
)
def test_bad_transforms(change, message, hint, tmp_path):
    path = sphere_scene(tmp_path, train=2, validation=0, test=1, size=2) / "transforms_train.json"
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))
    assert scene_refusal(str(tmp_path), tmp_path) == (str(path) + message, hint)


@pytest.mark.parametrize("name", ["train", "test", "val"])
def test_every_transforms_file_is_checked(name, tmp_path):
    path = sphere_scene(tmp_path, train=1, validation=1, test=1, size=2) / f"transforms_{name}.json"
    path.write_text("{")
    message, hint = scene_refusal(str(tmp_path), tmp_path)
    assert message.startswith(f"{path} is not readable as JSON: Expecting property name")
    assert hint == WANTED
    for content in (b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(content)
        assert scene_refusal(str(tmp_path), tmp_path)[0].startswith(f"{path} is not readable as JSON: ")
    path.write_text("[1, 2]")
    assert scene_refusal(str(tmp_path), tmp_path) == (f"{path}: camera_angle_x is missing", RADIANS)


def test_bad_pictures(tmp_path):
    folder = sphere_scene(tmp_path, train=3, validation=0, test=2, size=(3, 4))
    path = folder / "train" / "r_1.png"
    good = path.read_bytes()
    path.unlink()
    assert scene_refusal(str(folder), tmp_path) == (
        f"{path} is missing",
        "transforms_train.json names it; a file_path without a suffix means .png",
    )
    for content in (b"", b"no picture", good[: len(good) // 2]):
        path.write_bytes(content)
        message, hint = scene_refusal(str(folder), tmp_path)
        assert message.startswith(f"{path} is not a picture that can be read: ")
        assert hint == "PNG and JPEG are; write it again"
    Image.fromarray(np.full((3, 4), 1 << 20, np.int32)).save(path.with_suffix(".tif"))
    transforms = folder / "transforms_train.json"
    transforms.write_text(transforms.read_text().replace("r_1", "r_1.tif"))
    assert "its values have neither 8 nor 16 bits (mode I)" in scene_refusal(str(folder), tmp_path)[0]


@pytest.mark.parametrize(("name", "called"), [("train/r_2", "./train/r_2"), ("test/r_1", "./test/r_1")])
def test_pictures_of_several_sizes(name, called, tmp_path):
    folder = sphere_scene(tmp_path, train=3, validation=0, test=2, size=(3, 4))
    Image.new("RGB", (5, 3)).save(folder / f"{name}.png")
    assert scene_refusal(str(folder), tmp_path) == (f"{called} has 5×3 pixels, ./train/r_0 has 4×3", ONE_SIZE)


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
