"""Tensors on disk: safetensors files for weights, checked against what the model expects."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from stages.foundation.errors import ArtifactError, DataError, TaskError
from stages.foundation.files import write_bytes

ALIASES = "aliases"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors whole; equal tensors give equal bytes (the header holds no time and no version)."""
    ready = {name: value.detach().cpu().contiguous() for name, value in sorted(tensors.items())}
    write_bytes(path, save(ready, dict(metadata) if metadata else None))


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an npz file of arrays by name."""
    with path.open("wb") as stream:
        np.savez(stream, **arrays)


def load_tensors(path: Path, failure: type[ArtifactError] | type[DataError] = ArtifactError) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        failure: it is missing or damaged.
    """
    return _read(path, failure)[0]


def _read(path: Path, failure: type[ArtifactError] | type[DataError]) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as archive:
            return {name: archive.get_tensor(name) for name in archive.keys()}, archive.metadata() or {}  # noqa: SIM118
    except FileNotFoundError as error:
        raise failure(f"{path} is missing", "ocd status tells which stage makes it") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise failure(f"{path} is damaged: {error}", "ocd verify names what else is") from error


def save_model(path: Path, model: nn.Module) -> None:
    """Write a model's state dict under its own keys. Tied tensors are stored once; the header maps the other names to it."""
    seen: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in state_tensors(model).items():
        key = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if value.numel() and key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            tensors[name] = value
    save_tensors(path, tensors, {ALIASES: json.dumps(aliases, sort_keys=True)})


def load_model(path: Path, model: nn.Module) -> None:
    """Read what `save_model` wrote into a model of the same kind.

    Raises:
        ArtifactError: the file is missing or damaged, or its keys or shapes are another model's.
    """
    tensors, metadata = _read(path, ArtifactError)
    for name, kept in json.loads(metadata.get(ALIASES, "{}")).items():
        tensors[name] = tensors[kept]
    found = _from_parts(tensors, model)
    if problems := mismatches(found, model.state_dict()):
        raise ArtifactError(
            f"{path} does not fit the model:\n{joined_lines(problems)}",
            "the model changed; redo it with: ocd train-base --force",
        )
    model.load_state_dict(found)


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A state dict as plain tensors: a sparse one by its indices, values and size, extra state as JSON.

    Raises:
        TaskError: an entry is neither; it is named.
    """
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and value.layout == torch.strided:
            found[name] = value.detach()
        elif isinstance(value, Tensor) and value.layout == torch.sparse_coo:
            value = value.detach().coalesce()
            found |= {f"{name}/indices": value.indices(), f"{name}/values": value.values()}
            found[f"{name}/size"] = torch.tensor(value.shape)
        else:
            found[f"{name}/json"] = _json_bytes(name, value)
    return found


def _json_bytes(name: str, value: Any) -> Tensor:
    """An entry of a state dict that is no tensor, (bytes,)."""
    try:
        text = json.dumps(value)
        if json.loads(text) == value:
            return torch.tensor(list(text.encode()), dtype=torch.uint8)
    except (TypeError, ValueError):
        pass
    kind = f"a tensor of layout {value.layout}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise TaskError(
        f"the model's state dict has {name}, {kind}, which no file of tensors can hold",
        "register such a buffer with persistent=False, or let get_extra_state() return tensors or plain JSON",
    )


def _from_parts(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Any]:
    """The state dict that `state_tensors` made plain tensors of."""
    state: dict[str, Any] = dict(tensors)
    for name in model.state_dict():
        if f"{name}/json" in state:
            state[name] = json.loads(bytes(state.pop(f"{name}/json").tolist()))
        elif f"{name}/values" in state:
            indices, values, size = (state.pop(f"{name}/{part}") for part in ("indices", "values", "size"))
            state[name] = torch.sparse_coo_tensor(indices, values, size.tolist(), is_coalesced=True, check_invariants=True)
    return state


def load_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put what `state_tensors` gave into a model of the same kind."""
    model.load_state_dict(_from_parts(tensors, model))


def mismatches(tensors: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Keys missing, keys too many, and shapes that differ, one line each."""

    def shape(value: Any) -> tuple[int, ...] | str:
        return tuple(value.shape) if isinstance(value, Tensor) else "(no tensor)"

    found = [f"missing: {name} {shape(wanted[name])}" for name in wanted if name not in tensors]
    found += [f"unexpected: {name} {shape(tensors[name])}" for name in tensors if name not in wanted]
    found += [
        f"{name}: the file has {shape(tensors[name])}, the model {shape(wanted[name])}"
        for name in wanted
        if name in tensors and shape(tensors[name]) != shape(wanted[name])
    ]
    return found


def joined_lines(problems: Iterable[str], most: int = 8) -> str:
    """The first of some lines, indented, and how many more there are."""
    listed = list(problems)
    more = [f"  … and {len(listed) - most} more"] if len(listed) > most else []
    return "\n".join([f"  {line}" for line in listed[:most]] + more)
