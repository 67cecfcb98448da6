"""The user's data: npz files checked row by row, datasets of any kind read as batches, and their identity."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from stages.foundation.errors import DataError, TaskError
from stages.foundation.seeds import generator, shared_generators
from stages.foundation.trees import Tree, as_tree, leaves
from stages.tasks.user_code import user_code

PIECE_BYTES = 16 << 20
SAVE_HINT = 'write one with numpy.savez("train.npz", x=x, y=y)'
MISSING_HINT = "ocd.toml names it under [task]; relative paths start at its folder"


class ArrayDataset:
    """Arrays: items are pairs (x, y) of tensors, or (x, None) without labels."""

    def __init__(self, x: Tensor, y: Tensor | None) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | None]:
        return self.x[index], None if self.y is None else self.y[index]


class Split:
    """Some rows of a dataset, read as batches.

    Args:
        dataset: anything with a length and items (x, y).
        rows: numbers of its items, in order; None for all.
        name: what messages call it.
    """

    def __init__(self, dataset: Any, rows: Tensor | None = None, name: str = "data") -> None:
        self.dataset, self.name = dataset, name
        self.rows = torch.arange(_length(dataset, name)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, positions: Tensor | slice) -> "Split":
        """The split of some of these rows."""
        return Split(self.dataset, self.rows[positions], self.name)

    def inputs(self, positions: Tensor | Sequence[int]) -> Tree:
        """x of some rows, (B, …); labels are not touched."""
        rows = self.rows[torch.as_tensor(positions)]
        if isinstance(self.dataset, ArrayDataset):
            return self.dataset.x[rows]
        return self._stack([item[0] for item in self._items(rows)], rows)

    def labels(self, positions: Tensor | Sequence[int]) -> Tree | None:
        """y of some rows, (B, …), or None where arrays have none."""
        rows = self.rows[torch.as_tensor(positions)]
        if isinstance(self.dataset, ArrayDataset):
            return None if self.dataset.y is None else self.dataset.y[rows]
        return self._stack([item[1] for item in self._items(rows)], rows)

    def batch(self, positions: Tensor | Sequence[int], *seed: str | int) -> tuple[Tree, Tree]:
        """x and y of some rows, each (B, …).

        Args:
            positions: of the rows in this split.
            seed: what the random augmentation of a dataset depends on beside the row; without, a row is always the same.

        Raises:
            TaskError: the dataset raises; the row is named.
            DataError: its items are not pairs, or do not stack.
        """
        if isinstance(self.dataset, ArrayDataset):
            return self.inputs(positions), self.labels(positions)
        rows = self.rows[torch.as_tensor(positions)]
        items = self._items(rows, *seed)
        return self._stack([item[0] for item in items], rows), self._stack([item[1] for item in items], rows)

    def _stack(self, parts: list[Tree], rows: Tensor) -> Tree:
        try:
            # torch makes lists of tuples.
            return as_tree(parts[0], [as_float32(leaf) for leaf in leaves(default_collate(parts)).values()])
        except (TypeError, RuntimeError, KeyError) as error:
            raise DataError(
                f"{self.name}: rows {rows.tolist()[:4]} … do not stack into one batch: {error}",
                "every sample must have the same shape",
            ) from error

    def item(self, row: int, *seed: str | int) -> tuple[Tree, Tree]:
        """One item (x, y) of the dataset by its row there; shared generators are seeded by the row and `seed` meanwhile."""
        return self._items(torch.tensor([row]), *seed)[0]

    def _items(self, rows: Tensor, *seed: str | int) -> list[tuple[Tree, Tree]]:
        """Some items, each as if it were the only one."""
        found = []
        with shared_generators() as reseed:
            for row in rows.tolist():
                reseed("item", row, *seed)
                with user_code(f"{self.name}[{row}]"):
                    item = self.dataset[row]
                if not isinstance(item, (tuple, list)) or len(item) != 2:
                    raise DataError(
                        f"{self.name}[{row}] is {type(item).__name__}, expected a pair (x, y)", "let __getitem__ return x, y"
                    )
                found.append((item[0], item[1]))
        return found


def _length(dataset: Any, name: str) -> int:
    if isinstance(dataset, DataLoader):
        raise DataError(f"{name} is a DataLoader, expected the dataset that it loads from", "name that: loader.dataset")
    try:
        count = len(dataset)
    except TypeError as error:
        raise DataError(
            f"{name} has no length: {type(dataset).__name__}",
            "a map-style Dataset with __len__ and __getitem__ is needed",
        ) from error
    if count == 0:
        raise DataError(f"{name} is empty", "at least one sample is needed")
    return count


def as_float32(leaf: Any) -> Tensor:
    """A tensor of an array or number; float64 becomes float32."""
    leaf = torch.as_tensor(leaf)
    return leaf.float() if leaf.dtype == torch.float64 else leaf


def load_npz(path: Path, *, labels: bool) -> ArrayDataset:
    """Read arrays x and y (float64 becomes float32, small integers int64) and check every row.

    Args:
        path: the npz file; without `labels` also an npy file of x alone, which is left in the file and read as rows are asked
            for, if it is of float32 or int64.
        labels: whether y must be there; where it may be missing and is, labels are None.

    Raises:
        DataError: missing, not npz, pickled or ragged, empty, of unlike lengths, uint8 pictures, or not finite (the first
            such row is named).
    """
    if not path.is_file():
        raise DataError(f"{path} is missing", MISSING_HINT if labels else "--input names it")
    arrays = _read_arrays(path, labels)
    x, y = arrays["x"], arrays.get("y")
    if len(x) == 0:
        raise DataError(f"{path} is empty: x has shape {x.shape}", "at least one sample is needed")
    if y is not None and len(x) != len(y):
        raise DataError(f"{path}: x has {len(x):,} rows, y has {len(y):,}", "both need one row per sample")
    if x.dtype == np.uint8:
        raise DataError(
            f"{path}: x is uint8, which models do not take",
            "for pictures save x.astype('float32') / 255; for byte codes x.astype('int64')",
        )
    return ArrayDataset(_tensor(path, "x", x), None if y is None else _tensor(path, "y", y))


def _read_arrays(path: Path, labels: bool) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(path, mmap_mode="c", allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            with loaded as archive:
                return _from_archive(path, archive, ("x", "y") if labels else ("x",))
        if labels:
            raise ValueError("it is a single array")
        return {"x": _checked(path, "x", loaded)}
    except (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, RuntimeError) as error:
        why = "it holds no array" if "pickle" in str(error) else str(error)
        kinds = "an npz file" if labels else "an npz or npy file"
        raise DataError(
            f"{path} is not {kinds}: {why}",
            SAVE_HINT if labels else "write one with numpy.savez(FILE, x=x), or numpy.save(FILE, x)",
        ) from error


def _from_archive(path: Path, archive: Any, wanted: tuple[str, ...]) -> dict[str, np.ndarray]:
    names, found = archive.files, {}
    if missing := [name for name in wanted if name not in names]:
        raise DataError(f"{path} has no array {' or '.join(missing)}; it has {', '.join(names) or 'none'}", SAVE_HINT)
    for name in [name for name in ("x", "y") if name in names]:
        try:
            found[name] = _checked(path, name, archive[name])
        except ValueError as error:
            raise DataError(
                f"{path}: {name} is ragged or holds Python objects, which would need pickle",
                "save one rectangular array of numbers, padding where needed",
            ) from error
    return found


def _checked(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "fiub":
        raise DataError(f"{path}: {name} has dtype {array.dtype}, expected numbers", "save one rectangular array of numbers")
    if array.ndim == 0:
        raise DataError(
            f"{path}: {name} is a single number, expected one row per sample", "save one rectangular array of numbers"
        )
    return array


def _tensor(path: Path, name: str, array: np.ndarray) -> Tensor:
    # Where nothing has to be converted this is the array itself, in the file if it lies there.
    array = np.ascontiguousarray(array, dtype=np.float32 if array.dtype.kind == "f" else np.int64)
    if array.dtype.kind == "f":
        flat = array.reshape(len(array), -1)
        rows = max(1, min(4096, PIECE_BYTES // max(1, flat[:1].nbytes)))
        for start in range(0, len(flat), rows):
            bad = ~np.isfinite(flat[start : start + rows]).all(1)
            if bad.any():
                raise DataError(
                    f"{path}: {name}[{start + int(bad.argmax())}] is not finite",
                    "remove such rows, or fill what is missing",
                )
    return torch.from_numpy(array)


def split_rows(count: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows for training and rows held out, each ascending: a seeded part of `count`, at least one, is held out."""
    if count < 2:
        raise DataError(
            f"train has {count} sample, at least 2 are needed to hold one out",
            "give more samples, or set task.validation",
        )
    held = max(1, min(count - 1, round(count * fraction)))
    order = torch.randperm(count, generator=generator(seed, "validation"))
    return order[held:].sort().values, order[:held].sort().values


def check_like(x: Tree, known: Tree, name: str) -> None:
    """Compare a batch of inputs (B, …) with one of the training set.

    Raises:
        DataError: another structure, shape or dtype.
    """
    got, wanted = ({path: (tuple(leaf.shape[1:]), leaf.dtype) for path, leaf in leaves(tree).items()} for tree in (x, known))
    if got != wanted:
        raise DataError(
            f"{name}: a sample is {_describe(got)}, expected {_describe(wanted)} as in the training set",
            "give inputs as the model was trained on",
        )


def _describe(parts: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(
        f"{path + ' ' if path else ''}{str(dtype).removeprefix('torch.')} {shape}" for path, (shape, dtype) in parts.items()
    )


def require_tensors(output: Tree, count: int) -> None:
    """Refuse outputs that are no tensors with a row for each of `count` samples.

    Raises:
        TaskError: the model returned something else.
    """
    found = leaves(output)
    for path, leaf in (found or {"": None}).items():
        place = f" as {path}" if path else ""
        if not isinstance(leaf, Tensor):
            raise TaskError(
                f"the model returned {type(leaf).__name__}{place}, expected a tensor, or a tuple or dict of them",
                "let a forward() of a Task class return what is needed of it",
            )
        if leaf.shape[:1] != (count,):
            raise TaskError(
                f"the model returned{place} a tensor of shape {tuple(leaf.shape)} for {count} sample{'s' if count > 1 else ''}",
                "its first axis must be the sample; squeeze(-1) drops the last axis alone, squeeze() also the sample's",
            )
