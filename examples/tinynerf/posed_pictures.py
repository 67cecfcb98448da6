"""Posed pictures as they lie on the disk: Blender-format folders, and npz files in the form of tiny_nerf_data.npz.

An npz file with a test part of its own (`test_images`, `test_poses`): its first 100 images are for training, the others for
validation. One without, as published: its last 20 are for testing, the 6 before them for validation, the others for training.
"""

import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.foundation.errors import DataError, SettingsError

TRAIN_VIEWS, VALIDATION_VIEWS, TEST_VIEWS = 100, 6, 20
LEAST_VIEWS = 32  # of an npz file without a test part
LAYOUTS = "give a folder with transforms_train.json, or an npz file with arrays images, poses and focal"
FORM = '{"camera_angle_x": radians, "frames": [{"file_path": "./train/r_0", "transform_matrix": 4×4 numbers}, …]}'
POSE = "expected a camera-to-world matrix: orthonormal columns, determinant +1, last row 0 0 0 1"
ARRAYS = "expected images (N, H, W, 3 or 4), poses (N, 4, 4) and focal, optionally test_images and test_poses"


@dataclass(frozen=True)
class Part:
    """Pictures of one split and where they were taken from."""

    poses: np.ndarray  # (N, 4, 4) float64, camera to world
    names: tuple[str, ...]  # what messages call the pictures
    tangent: float  # of half the horizontal angle of view: half a picture's width over its focal length
    taken: int  # how many views are taken where the settings do not say
    picture: Callable[[int], np.ndarray]  # its number to (H, W, 1 to 4) float32 in [0, 1]; alpha is the last of 2 or 4


def blender_parts(folder: Path) -> dict[str, Part]:
    """The parts "train", "test" and, where it is there, "validation" of a Blender-format folder; pictures are read later.

    Raises:
        DataError: a JSON file that is missing or not of its form, a pose that is not a rigid motion.
    """
    paths = {split: folder / f"transforms_{name}.json" for split, name in (("train", "train"), ("test", "test"))}
    for path in paths.values():
        if not path.is_file():
            found = ", ".join(sorted(other.name for other in folder.glob("*.json"))) or "none"
            raise DataError(
                f"{folder} has no {path.name}; JSON files there: {found}",
                "a Blender-format scene has transforms_train.json and transforms_test.json beside its folders of pictures",
            )
    if (validation := folder / "transforms_val.json").is_file():
        paths["validation"] = validation
    return {split: _blender_part(path, split) for split, path in paths.items()}


def _blender_part(path: Path, split: str) -> Part:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not readable as JSON: {error}", f"expected {FORM}") from error
    angle, frames = (described.get(key) if isinstance(described, dict) else None for key in ("camera_angle_x", "frames"))
    if not _is_number(angle) or not 1e-6 < angle < math.pi:
        raise DataError(
            f"{path}: camera_angle_x is {'missing' if angle is None else repr(angle)}",
            "expected the horizontal angle of view in radians, between 0 and π",
        )
    if not isinstance(frames, list) or not frames:
        raise DataError(f"{path} has no frames", f"expected {FORM}")
    files = [_picture_file(path, number, frame) for number, frame in enumerate(frames)]
    names = tuple(frame["file_path"] for frame in frames)
    poses = np.stack([_matrix(path, frame) for frame in frames])
    check_rigid(poses, [f"{path}: transform_matrix of {name}" for name in names])
    taken = {"train": len(names), "validation": VALIDATION_VIEWS, "test": TEST_VIEWS}[split]
    return Part(poses, names, math.tan(0.5 * angle), taken, lambda number: read_picture(files[number], path.name))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _picture_file(path: Path, number: int, frame: Any) -> Path:
    """The file of a frame's picture, "…" or "….png", which must lie under the folder of `path`."""
    name = frame.get("file_path") if isinstance(frame, dict) else None
    if not isinstance(name, str) or not name:
        raise DataError(f"{path}: frames[{number}] has no file_path", f"expected {FORM}")
    inside = os.path.relpath(os.path.normpath(path.parent / name), path.parent)
    if Path(inside).parts[:1] == (os.pardir,):
        raise DataError(f"{path}: file_path {name} leaves the folder", "give it relative to the scene's folder, as ./train/r_0")
    return path.parent / (inside if Path(inside).suffix else f"{inside}.png")


def _matrix(path: Path, frame: dict[str, Any]) -> np.ndarray:
    """The pose of a frame, (4, 4) float64."""
    rows = frame.get("transform_matrix")
    right = isinstance(rows, list) and len(rows) == 4 and all(isinstance(row, list) and len(row) == 4 for row in rows)
    if not right or not all(_is_number(value) for row in rows for value in row):
        problem = "missing" if rows is None else "not 4×4 numbers"
        raise DataError(f"{path}: transform_matrix of {frame['file_path']} is {problem}", f"expected {FORM}")
    return np.array([[float(value) if abs(value) < 1e300 else math.inf for value in row] for row in rows])


def read_picture(path: Path, named_by: str) -> np.ndarray:
    """A picture (H, W, C) float32 in [0, 1]: grey, grey and alpha, colours, or colours and alpha.

    Raises:
        DataError: missing, or not a picture that Pillow reads.
        SettingsError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise SettingsError(
            "pictures are read with Pillow, which is not installed", 'pip install "torch-ocd[examples]", or pip install pillow'
        ) from error
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith("I") and np.max(picture) <= 65535:
                return np.asarray(picture, np.float32)[..., None] / np.float32(65535)
            if picture.mode[0] in "IF":
                raise ValueError(f"its values have neither 8 nor 16 bits (mode {picture.mode})")
            alpha = "A" in picture.getbands() or "transparency" in picture.info
            return np.asarray(picture.convert("RGBA" if alpha else "RGB"), np.float32) / np.float32(255)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing", f"{named_by} names it; a file_path without a suffix means .png") from error
    except Exception as error:  # what decoders raise on damaged files is of many kinds
        raise DataError(f"{path} is not a picture that can be read: {error}", "PNG and JPEG are; write it again") from error


def npz_parts(path: Path, hint: str) -> dict[str, Part]:
    """The parts "train", "test" and, where there are enough images, "validation" of an npz file.

    Args:
        path: the file.
        hint: what to do where it cannot be read.

    Raises:
        DataError: not an npz file, arrays missing or not of their form, values outside [0, 1], poses that are no rigid motions.
    """
    arrays = _arrays(path, hint)
    images, poses = _images(path, arrays, ""), _poses(path, arrays, "")
    focal = arrays["focal"]
    if focal.size != 1 or focal.dtype.kind not in "fiu" or not 1e-6 < focal.item() < 1e9:
        raise DataError(f"{path}: focal is {focal.tolist()}", "expected one positive number, the focal length in pixels")
    tangent = 0.5 * images.shape[2] / focal.item()
    names = tuple(f"{path}: images[{row}]" for row in range(len(images)))

    def part(rows: slice) -> Part:
        return Part(poses[rows], names[rows], tangent, len(names[rows]), lambda row: _floats(images[rows][row]))

    if "test_images" in arrays:
        tests, test_poses = _images(path, arrays, "test_"), _poses(path, arrays, "test_")
        test_names = tuple(f"{path}: test_images[{row}]" for row in range(len(tests)))
        test = Part(test_poses, test_names, tangent, len(tests), lambda row: _floats(tests[row]))
        held = {"validation": part(slice(TRAIN_VIEWS, None))} if len(images) > TRAIN_VIEWS else {}
        return {"train": part(slice(TRAIN_VIEWS)), **held, "test": test}
    if len(images) < LEAST_VIEWS:
        raise DataError(
            f"{path} has {len(images)} images and no test part, at least {LEAST_VIEWS} are needed",
            f"the last {TEST_VIEWS} are for testing, {VALIDATION_VIEWS} for validation; or add test_images and test_poses",
        )
    last, held = len(images) - TEST_VIEWS, len(images) - TEST_VIEWS - VALIDATION_VIEWS
    return {"train": part(slice(held)), "validation": part(slice(held, last)), "test": part(slice(last, None))}


def _arrays(path: Path, hint: str) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        with loaded as archive:
            named, of_test = {"images", "poses", "focal"}, {"test_images", "test_poses"}
            if of_test & set(archive):
                named |= of_test
            if missing := sorted(named - set(archive)):
                raise DataError(f"{path} has no array {' or '.join(missing)}; it has {', '.join(archive) or 'none'}", ARRAYS)
            return {name: archive[name] for name in named}
    except (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, RuntimeError) as error:
        why = "it holds no plain arrays" if "pickle" in str(error) else str(error)
        raise DataError(f"{path} is not an npz file that can be read: {why}", hint) from error


def _images(path: Path, arrays: dict[str, np.ndarray], prefix: str) -> np.ndarray:
    """Images (N, H, W, 3 or 4), checked: uint8, or floats in [0, 1]."""
    images, name = arrays[f"{prefix}images"], f"{prefix}images"
    if images.ndim != 4 or images.shape[3] not in (3, 4) or images.size == 0:
        raise DataError(f"{path}: {name} has shape {images.shape}", ARRAYS)
    if images.dtype.kind != "f" and images.dtype != np.uint8:
        raise DataError(f"{path}: {name} has dtype {images.dtype}", "expected uint8, or floats in [0, 1]")
    for row, picture in enumerate(images if images.dtype.kind == "f" else ()):
        low, high = picture.min(), picture.max()
        if not (low >= 0 and high <= 1):
            spread = f"has values from {low:.4g} to {high:.4g}" if np.isfinite([low, high]).all() else "is not finite"
            raise DataError(f"{path}: {name}[{row}] {spread}", "expected uint8, or floats in [0, 1]")
    return images


def _poses(path: Path, arrays: dict[str, np.ndarray], prefix: str) -> np.ndarray:
    """Poses (N, 4, 4) float64 of the images, checked."""
    poses, count, name = arrays[f"{prefix}poses"], len(arrays[f"{prefix}images"]), f"{prefix}poses"
    if poses.shape != (count, 4, 4) or poses.dtype.kind not in "fiu":
        found = f"shape {poses.shape} and dtype {poses.dtype}"
        raise DataError(f"{path}: {name} has {found}, for {count} pictures", ARRAYS)
    poses = poses.astype(np.float64)
    check_rigid(poses, [f"{path}: {name}[{row}]" for row in range(count)])
    return poses


def _floats(picture: np.ndarray) -> np.ndarray:
    return picture.astype(np.float32) / np.float32(255 if picture.dtype == np.uint8 else 1)


def check_rigid(poses: np.ndarray, names: list[str]) -> None:
    """Check that poses (N, 4, 4) only rotate and move.

    Raises:
        DataError: the first that does not, and what is wrong with it.
    """
    for pose, name in zip(poses, names, strict=True):
        if problem := _not_rigid(pose):
            raise DataError(f"{name} is not a rigid motion: {problem}", POSE)


def _not_rigid(pose: np.ndarray) -> str:
    """What keeps a pose (4, 4) from being a rigid motion, "" if nothing."""
    if not np.isfinite(pose).all():
        return "it has entries that are not finite"
    if np.abs(pose[3] - (0, 0, 0, 1)).max() > 1e-6:
        return f"its last row is {_listed(pose[3], ' ')}"
    with np.errstate(over="ignore", invalid="ignore"):
        products, determinant = pose[:3, :3].T @ pose[:3, :3], float(np.linalg.det(pose[:3, :3]))
    if np.abs(products - np.eye(3)).max() <= 1e-3 and determinant > 0:
        return ""
    lengths, others = _listed(np.sqrt(products.diagonal())), _listed(products[np.triu_indices(3, 1)])
    return f"its columns have lengths {lengths}, products {others} with one another, determinant {determinant:.4g}"


def _listed(values: np.ndarray, between: str = ", ") -> str:
    return between.join(f"{value:.4g}" for value in values.round(6) + 0.0)  # + 0.0: no −0
