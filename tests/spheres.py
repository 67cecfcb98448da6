"""Scenes of coloured spheres, drawn from formulas: what a loader of posed views reads, and what a small NeRF can learn.

Nothing here is taken from the example under test: cameras, rays and colours are worked out on their own.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

RADIUS = 4.0  # of the hemisphere the cameras stand on; all spheres lie within 1.2 of the origin, so at depths of 2.8 to 5.2
ANGLE = 0.6911112  # horizontal angle of view in radians, the Lego scene's
LIGHT = np.array([0.4, -0.5, 0.77])
# Centre, radius and colour of each.
SPHERES = (
    ((0.0, 0.0, 0.0), 0.5, (0.9, 0.8, 0.2)),
    ((0.75, 0.0, 0.1), 0.35, (0.9, 0.15, 0.1)),
    ((-0.4, 0.65, -0.1), 0.4, (0.1, 0.75, 0.2)),
    ((-0.4, -0.65, 0.2), 0.4, (0.15, 0.3, 0.95)),
    ((0.1, 0.1, 0.8), 0.3, (0.85, 0.85, 0.85)),
)


def camera(azimuth: float, elevation: float) -> np.ndarray:
    """The pose (4, 4), camera to world, of a camera that looks at the origin; z is up in the world, angles in radians."""
    back = np.array([math.cos(azimuth) * math.cos(elevation), math.sin(azimuth) * math.cos(elevation), math.sin(elevation)])
    right = np.array([-math.sin(azimuth), math.cos(azimuth), 0.0])
    pose = np.eye(4)
    pose[:3] = np.stack([right, np.cross(back, right), back, RADIUS * back], axis=1)
    return pose


def cameras(split: str, count: int) -> np.ndarray:
    """Poses (count, 4, 4): training and validation spread over the hemisphere, test on an orbit around it."""
    if split == "test":
        return np.stack([camera(2 * math.pi * number / count, math.pi / 6) for number in range(count)])
    turn, first = math.pi * (3 - math.sqrt(5)), {"train": 0.0, "validation": 0.5}[split]
    # Equal steps of height are equal areas of the hemisphere.
    heights = [0.1 + 0.8 * (number + 0.5) / count for number in range(count)]
    return np.stack([camera(first + turn * number, math.asin(height)) for number, height in enumerate(heights)])


def pixel(pose: np.ndarray, point: Any, size: tuple[int, int], focal: float) -> tuple[float, float]:
    """Where a point of the world is in a picture: column and row, from the upper left corner, in pixels."""
    right, up, back = pose[:3, :3].T @ (np.asarray(point, float) - pose[:3, 3])
    return size[1] / 2 + focal * right / -back, size[0] / 2 - focal * up / -back


def trace(origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """What rays (R, 3) of any length see: colours and alpha (R, 4), black and 0 where they hit nothing."""
    directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    seen, nearest = np.zeros((len(origins), 4)), np.full(len(origins), np.inf)
    for centre, radius, colour in SPHERES:
        offset = origins - centre
        middle = -(offset * directions).sum(1)
        square = radius**2 - ((offset + middle[:, None] * directions) ** 2).sum(1)
        depth = middle - np.sqrt(square.clip(0))
        hit = (square > 0) & (depth > 0) & (depth < nearest)
        normal = (origins + depth[:, None] * directions - centre) / radius
        shade = 0.6 + 0.4 * (normal @ LIGHT / np.linalg.norm(LIGHT)).clip(0)
        lit = np.concatenate([shade[:, None] * colour, np.ones((len(origins), 1))], axis=1)
        seen[hit], nearest[hit] = lit[hit], depth[hit]
    return seen


def picture(pose: np.ndarray, size: tuple[int, int], focal: float, fineness: int = 3) -> np.ndarray:
    """A picture (H, W, 4) of the spheres in [0, 1], fineness² rays a pixel; colours are not multiplied by alpha."""
    height, width = size
    rows = (np.arange(height * fineness) + 0.5) / fineness
    columns = (np.arange(width * fineness) + 0.5) / fineness
    row, column = np.meshgrid(rows, columns, indexing="ij")
    local = np.stack([(column - width / 2) / focal, (height / 2 - row) / focal, -np.ones_like(row)], axis=-1).reshape(-1, 3)
    seen = trace(np.broadcast_to(pose[:3, 3], local.shape), local @ pose[:3, :3].T)
    seen = seen.reshape(height, fineness, width, fineness, 4).mean((1, 3))
    alpha = seen[..., 3:]
    return np.concatenate([seen[..., :3] / np.maximum(alpha, 1e-9), alpha], axis=-1)


def focal_of(size: tuple[int, int]) -> float:
    """The focal length in pixels of a picture of this height and width."""
    return 0.5 * size[1] / math.tan(0.5 * ANGLE)


def bytes_of(values: np.ndarray, alpha: bool) -> np.ndarray:
    """Pictures (…, 4) in [0, 1] as uint8: with alpha as they are, without it (…, 3) on black."""
    return (255 * (values if alpha else values[..., :3] * values[..., 3:])).round().astype(np.uint8)


def sphere_scene(
    folder: Path, train: int = 8, validation: int = 2, test: int = 4, size: int | tuple[int, int] = 12, alpha: bool = True
) -> Path:
    """Write a Blender-format folder and return it.

    Args:
        folder: where; made if need be.
        train: how many views for training.
        validation: for validation; 0 for a scene without transforms_val.json.
        test: for testing.
        size: of the square pictures in pixels, or height and width.
        alpha: pictures with a transparent background; otherwise it is black.
    """
    from PIL import Image

    size = (size, size) if isinstance(size, int) else size
    for split, name, count in (("train", "train", train), ("validation", "val", validation), ("test", "test", test)):
        if not count:
            continue
        (folder / name).mkdir(parents=True, exist_ok=True)
        frames = []
        for number, pose in enumerate(cameras(split, count)):
            drawn = bytes_of(picture(pose, size, focal_of(size)), alpha)
            Image.fromarray(drawn).save(folder / name / f"r_{number}.png")
            frames.append({"file_path": f"./{name}/r_{number}", "transform_matrix": pose.tolist()})
        described = {"camera_angle_x": ANGLE, "frames": frames}
        (folder / f"transforms_{name}.json").write_text(json.dumps(described, indent=1))
    return folder


def sphere_npz(
    path: Path, views: int = 32, test: int = 0, size: int | tuple[int, int] = 12, alpha: bool = False, **arrays: Any
) -> Path:
    """Write an npz file in the form of tiny_nerf_data.npz and return its path.

    Args:
        path: where.
        views: how many images in `images`.
        test: how many in `test_images`; 0 for a file without a test part.
        size: of the square pictures in pixels, or height and width.
        alpha: images of four channels; otherwise of three, on black.
        arrays: what to save in place of what would be, or None to leave it out.
    """
    size = (size, size) if isinstance(size, int) else size
    poses = {"": cameras("train", views)} | ({"test_": cameras("test", test)} if test else {})
    content: dict[str, Any] = {"focal": np.float64(focal_of(size))}
    for prefix, some in poses.items():
        drawn = np.stack([picture(pose, size, focal_of(size)) for pose in some])
        content[f"{prefix}images"] = bytes_of(drawn, alpha).astype(np.float32) / np.float32(255)
        content[f"{prefix}poses"] = some.astype(np.float32)
    content |= arrays
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: array for name, array in content.items() if array is not None})
    return path
