"""Posed views of a scene as rays and colours: the Lego scene, a Blender-format folder, or an npz like tiny_nerf_data.npz."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from posed_pictures import LAYOUTS, Part, blender_parts, npz_parts
from torch import Tensor

from stages.foundation.errors import DataError, SettingsError
from stages.tasks.fetch import cache_folder, fetch

LEGO = "tiny_nerf/tiny_nerf_data.npz"
# No checksum of the published file is known to us: the first download's holds, see `fetch`.
LEGO_URLS = (
    "https://cseweb.ucsd.edu/~viscomp/projects/LF/papers/ECCV20/nerf/tiny_nerf_data.npz",
    "https://people.eecs.berkeley.edu/~bmild/nerf/tiny_nerf_data.npz",
)
SPLITS = {"train": "training", "validation": "validation", "test": "test"}


@dataclass(frozen=True)
class Views:
    """Some views, pixel by pixel: rows from the top, left to right."""

    rays: Tensor  # (N, H·W, 6) float32: origin, then direction, whose component along the camera's axis is 1
    colours: Tensor  # (N, H·W, 3) float32 in [0, 1]

    def __len__(self) -> int:
        return len(self.rays)


@dataclass(frozen=True)
class Scene:
    """The views of a scene."""

    train: Views
    validation: Views | None  # None: the source has none
    test: Views
    size: tuple[int, int]  # height and width
    notes: tuple[str, ...]  # what a person should be told


def load_scene(
    source: str | None,
    root: Path,
    *,
    size: int = 100,
    train_views: int | None = None,
    validation_views: int | None = None,
    test_views: int | None = None,
    sha256: str | None = None,
) -> Scene:
    """Read a scene; its pictures are composited on black and, where larger than `size`, averaged to it.

    Args:
        source: a Blender-format folder or an npz file; None for the Lego scene, from `OCD_DATA` or downloaded.
        root: where relative paths start.
        size: pixels of the longer side; smaller pictures stay as they are.
        train_views: how many, the first ones; None for all.
        validation_views: how many, the first ones; None for 6, or all where there are fewer or an npz has them.
        test_views: how many, evenly spaced; None for 20, or all where there are fewer or an npz has a test part of its own.
        sha256: of the Lego scene's file; None to take what the first download gave.

    Raises:
        DataError: missing or bad files, poses or pictures, or fewer views than asked for; the file or frame is named.
        SettingsError: a number that is not positive, a checksum for another source, or Pillow is missing.
    """
    asked = {"train": train_views, "validation": validation_views, "test": test_views}
    _check_counts({"size": size, **{f"{split}_views": count for split, count in asked.items()}})
    parts = _parts(source, root, sha256)
    rows = {split: _rows(parts.get(split), split, count) for split, count in asked.items()}
    reader = _Reader(size)
    views = {split: reader.views(parts[split], rows[split]) for split in SPLITS if split in parts}
    return Scene(views["train"], views.get("validation"), views["test"], reader.shape, reader.notes())


def pixel_rays(pose: Tensor, size: tuple[int, int], focal: float) -> Tensor:
    """Rays through the centres of a camera's pixels (H·W, 6): origin, then direction, not normalised.

    Args:
        pose: (4, 4), camera to world; the camera looks along its −z, y is up, x is right.
        size: height and width in pixels.
        focal: focal length in pixels.
    """
    height, width = size
    pose = pose.double()
    right = (torch.arange(width, dtype=torch.float64, device=pose.device) + 0.5 - width / 2) / focal
    down = (torch.arange(height, dtype=torch.float64, device=pose.device) + 0.5 - height / 2) / focal
    down, right = torch.meshgrid(down, right, indexing="ij")
    directions = torch.stack([right, -down, -torch.ones_like(right)], dim=-1).reshape(-1, 3) @ pose[:3, :3].T
    return torch.cat([pose[:3, 3].expand_as(directions), directions], dim=1).float()


def on_black(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W, 1 to 4) as colours (H, W, 3): alpha, the last of 2 or 4 channels, is multiplied in; grey is repeated."""
    if picture.shape[2] in (2, 4):
        picture = picture[..., :-1] * picture[..., -1:]
    return np.broadcast_to(picture, (*picture.shape[:2], 3))


def reduction(shape: tuple[int, int], most: int) -> float:
    """How many pixels become one so that no side of (H, W) is longer than `most`; never less than 1."""
    return max(1.0, max(shape) / most)


def shrink(picture: np.ndarray, most: int) -> np.ndarray:
    """Average a picture (H, W, 3) over squares of pixels so that its longer side is `most`; smaller ones stay as they are.

    The squares keep their shape: what is left of the shorter side, less than a square, is cut off at both ends alike.
    """
    scale = reduction(picture.shape[:2], most)
    if scale == 1:
        return picture
    rows, columns = (_averages(count, scale) for count in picture.shape[:2])
    tall = (rows @ picture.reshape(len(picture), -1)).reshape(len(rows), -1, 3)
    return (columns @ tall).clip(0, 1)


def _averages(count: int, scale: float) -> np.ndarray:
    """What share each of `count` pixels has in each of those that are `scale` times as long, (fewer, count) float32."""
    fewer = max(1, int(count / scale + 1e-6))
    starts = (count - fewer * scale) / 2 + scale * np.arange(fewer)[:, None]
    pixels = np.arange(count)
    shares = (np.minimum(starts + scale, pixels + 1) - np.maximum(starts, pixels)).clip(0)
    return (shares / shares.sum(1, keepdims=True)).astype(np.float32)


class _Reader:
    """Reads views of all parts of a scene, whose pictures must have one size.

    Args:
        size: the longest side in pixels that pictures are to have.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.shape = (0, 0)
        self._first: tuple[str, tuple[int, int]] | None = None
        self._pictures = self._with_alpha = 0

    def views(self, part: Part, rows: list[int]) -> Views:
        """These rows of a part.

        Raises:
            DataError: a picture that cannot be read, or of another size than the first.
        """
        rays, colours = [], []
        for row in rows:
            picture = part.picture(row)
            focal = self._focal(part, row, picture.shape[:2])
            self._pictures += 1
            self._with_alpha += picture.shape[2] in (2, 4)
            picture = shrink(on_black(picture), self.size)
            self.shape = picture.shape[:2]
            rays.append(pixel_rays(torch.from_numpy(part.poses[row]), self.shape, focal))
            colours.append(torch.from_numpy(np.array(picture, np.float32)).reshape(-1, 3))
        return Views(torch.stack(rays), torch.stack(colours))

    def _focal(self, part: Part, row: int, shape: tuple[int, int]) -> float:
        """The focal length in pixels of the reduced picture."""
        name, known = self._first = self._first or (part.names[row], shape)
        if shape != known:
            raise DataError(
                f"{part.names[row]} has {shape[1]}×{shape[0]} pixels, {name} has {known[1]}×{known[0]}",
                "all pictures of a scene must have one size (width × height)",
            )
        return 0.5 * shape[1] / part.tangent / reduction(shape, self.size)

    def notes(self) -> tuple[str, ...]:
        """What a person should be told of the pictures read."""
        if not self._with_alpha:
            return ()
        subject = "1 picture has" if self._with_alpha == 1 else f"{self._with_alpha} pictures have"
        return (f"{subject} an alpha channel: composited on black",)


def _parts(source: str | None, root: Path, sha256: str | None) -> dict[str, Part]:
    if source is None:
        path = fetch(LEGO, LEGO_URLS, sha256 and sha256.lower())
        if path.is_relative_to(cache_folder()):
            return npz_parts(path, f"delete it and {path}.sha256 to download it again")
        return npz_parts(path, "replace it, or unset OCD_DATA to download it")
    if sha256 is not None:
        raise SettingsError(f"a sha256 is set, which is for the downloaded scene, but the source is {source}", "leave it out")
    path = root / Path(source).expanduser()
    if path.is_dir():
        return blender_parts(path)
    if not path.is_file():
        raise DataError(f"{path} is missing", LAYOUTS)
    return npz_parts(path, LAYOUTS)


def _check_counts(counts: dict[str, Any]) -> None:
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise SettingsError(f"task.args.{name} is {count!r}", "it must be a whole number, 1 or more, or left out")


def _rows(part: Part | None, split: str, asked: int | None) -> list[int]:
    """Which rows of a part are taken: the first, of the test part evenly spaced ones.

    Raises:
        DataError: fewer than asked for.
    """
    there = len(part.names) if part else 0
    count = min(part.taken, there) if part and asked is None else asked or 0
    if count > there:
        setting = f"task.args.{split}_views"
        raise DataError(
            f"the scene has {there} {SPLITS[split]} view{'' if there == 1 else 's'}, "
            f"{count} {'was' if count == 1 else 'were'} asked for",
            f"set {setting} to at most {there}, or leave it out" if there else f"leave {setting} out",
        )
    return [number * there // count for number in range(count)] if split == "test" else list(range(count))
