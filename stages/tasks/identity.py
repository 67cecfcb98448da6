"""What a dataset that only code can load is known by: its length and some of its items."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from stages.foundation.errors import DataError
from stages.foundation.seeds import seed_of
from stages.foundation.trees import Tree, leaves
from stages.tasks.data import Split

# Items that are looked at, and how many of them are asked for twice.
IDENTITY_ITEMS, TWICE = 64, 4


def dataset_identity(dataset: Any, name: str) -> str:
    """sha256 of a dataset's length and of 64 seeded items (all, where there are fewer): shapes, dtypes and bytes."""
    split = Split(dataset, name=name)
    count = len(split)
    rows = (
        sorted({seed_of("identity", count, i) % count for i in range(IDENTITY_ITEMS)})
        if count > IDENTITY_ITEMS
        else range(count)
    )
    found = hashlib.sha256(str(count).encode())
    for place, row in enumerate(rows):
        content = _content_of(split.item(row), row, name)
        if place < TWICE and _content_of(split.item(row), row, name) != content:
            raise DataError(
                f"{name}[{row}] is another item each time it is asked for: a run could not be gone on with",
                "draw from the generators of torch, numpy and Python that are shared, which are seeded for each item",
            )
        found.update(content)
    return found.hexdigest()


def _content_of(item: tuple[Tree, Tree], row: int, name: str) -> bytes:
    """Paths, shapes, dtypes and bytes of an item's tensors."""
    found = []
    for part in item:
        for path, leaf in (leaves(part) or {"": part}).items():
            array = _numbers(leaf, f"{name}[{row}]")
            found.append(f"{row}/{path}/{tuple(array.shape)}/{array.dtype}".encode())
            found.append(array.reshape(-1).view(torch.uint8).numpy().tobytes() if array.numel() else b"")
    return b"".join(found)


def _numbers(leaf: Any, place: str) -> Tensor:
    try:
        return torch.as_tensor(leaf).contiguous().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{place} holds {type(leaf).__name__}, expected numbers", "let items be tensors, arrays or numbers"
        ) from error
