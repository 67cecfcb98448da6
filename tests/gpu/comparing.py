"""What a stage has left, as numbers, and how near those of a GPU have to be to the CPU's."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import zarr
from folders import Folder, store
from safetensors.torch import load_file

# Draws are the CPU's, so that only the order of sums differs: batches are larger on a GPU, attention is taken apart. Trainings
# of a few steps multiply what comes in.
TOLERANCE = 1e-4


def numbers(folder: Folder, stage: str) -> dict[str, np.ndarray]:
    """The arrays of a finished stage by name; deltas of degenerate samples are rounding noise and left out."""
    if stage == "collect":
        found = store(folder)
        kept = ~found["degenerate"]
        return {name: value if name == "degenerate" else value[kept] for name, value in found.items()}
    if stage == "infer":
        saved = folder.run / "infer/test/deltas.zarr"
        return {**folder.predictions(), **({"saved": zarr.open_group(saved, mode="r")["delta"][:]} if saved.exists() else {})}
    if stage in ("select-layer", "evaluate"):
        record = folder.read({"select-layer": "select-layer/layer.json", "evaluate": "evaluate/results.json"}[stage])
        # Times, and the square of a ratio of widths.
        for name in ("cost", "samples_to_decide"):
            record.pop(name, None)
        return {name: np.asarray(value) for name, value in _flat(record) if not isinstance(value, str)}
    files = sorted((folder.run / stage).glob("*.safetensors"))
    return {f"{path.stem}/{name}": value.float().numpy() for path in files for name, value in load_file(path).items()}


def _flat(record: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested dicts and lists by their path; a row of a table by its name."""
    if isinstance(record, dict):
        for key, value in record.items():
            yield from _flat(value, f"{name}/{key}")
    elif isinstance(record, list):
        for place, value in enumerate(record):
            key = value.get("name", place) if isinstance(value, dict) else place
            yield from _flat(value, f"{name}/{key}")
    elif record is not None:
        yield name, record


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """‖a − b‖ / ‖b‖, of two numbers at least a ten-thousandth of one apart from nothing."""
    assert found.shape == wanted.shape
    gap = np.linalg.norm(found.astype(np.float64) - wanted.astype(np.float64))
    return float(gap / max(np.linalg.norm(wanted.astype(np.float64)), 1e-4 * wanted.size**0.5))


def differences(folder: Folder, other: Folder, stage: str) -> dict[str, float]:
    """How far every array of a stage is from the other folder's."""
    found, wanted = numbers(folder, stage), numbers(other, stage)
    assert found.keys() == wanted.keys()
    return {name: difference(found[name], wanted[name]) for name in found}


def assert_same(folder: Folder, other: Folder, *stages: str, tolerance: float = TOLERANCE) -> None:
    """Stages have the same results as those of another folder, but for rounding."""
    for stage in stages:
        wrong = {name: gap for name, gap in differences(folder, other, stage).items() if not gap <= tolerance}
        assert not wrong, f"{stage}: {json.dumps(wrong)}"


def assert_alike(found: str, wanted: str, *, besides: str = "cost") -> None:
    """Two JSON texts say the same, but for rounding and for what is under one name."""
    mine, other = (
        {name: value for name, value in _flat(json.loads(text)) if f"/{besides}" not in name} for text in (found, wanted)
    )
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        if isinstance(value, (int, float)):
            assert difference(np.asarray(value), np.asarray(other[name])) <= TOLERANCE, name
        else:
            assert value == other[name], name
