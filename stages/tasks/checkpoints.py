"""Importing trained weights from the files that people have: nested, prefixed, sharded, with other things beside them."""

import argparse
import collections
import copy
import pathlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stages.foundation.errors import DataError, TaskError
from stages.foundation.tensors import joined_lines, load_tensors, mismatches
from stages.foundation.weights import INDEX, SETTING_HINT, weight_files
from stages.tasks.user_code import user_code

# What wrappers put into the keys, wherever the wrapped module is.
WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
AVERAGED = re.compile(r"(^|[._])(ema|averaged?|avg|swa)([._]|$)", re.IGNORECASE)
# What keys at the top of a file are called.
ROOT = "the keys of the file itself"
# Below this, a dict of a checkpoint is no state dict of a model.
DEEPEST = 3
SAVE_HINT = 'save weights alone where that class is known, best as safetensors: torch.save(model.state_dict(), "weights.pt")'


@dataclass(frozen=True)
class Imported:
    """What was taken from a file of weights.

    Attributes:
        file: its name.
        key: the entry of the checkpoint, "" where it is a state dict itself.
        prefix: what was cut off its keys.
        ignored: keys of the entry that the model has no use for.
        others: entries or prefixes that would fit, too.
    """

    file: str
    key: str = ""
    prefix: str = ""
    ignored: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """What there is to say, for the stage's summary."""
        found = {"imported": self.file, "key": self.key, "prefix": self.prefix, "ignored": self.ignored, "others": self.others}
        return {name: value for name, value in found.items() if value}

    def sentence(self) -> str:
        """The same for people; "" where the file is a plain state dict of the model."""
        parts = [f"its entry {self.key!r} is taken"] if self.key else []
        parts += [f"the prefix {self.prefix!r} of its keys is dropped"] if self.prefix else []
        parts += [f"{_few(self.ignored)} is ignored"] if self.ignored else []
        parts += [f"{_few(self.others)} fits as well (to take it: --weights-key {self.others[0]})"] if self.others else []
        return f"{self.file}: {'; '.join(parts)}" if parts else ""


@dataclass(frozen=True)
class _Candidate:
    """Some keys of one entry of a checkpoint, as the model may have them."""

    key: str
    prefix: str
    tensors: dict[str, Tensor]
    beside: list[str]
    matching: int

    @property
    def place(self) -> str:
        return ".".join(part for part in (self.key, self.prefix.rstrip(".")) if part) or ROOT

    @property
    def averaged(self) -> bool:
        return bool(AVERAGED.search(self.place))


def import_weights(path: Path, model: nn.Module, key: str | None = None) -> Imported:
    """Load a user's trained weights, reading no code: safetensors, a `.pt`, shards by their index, a Hugging Face folder.

    The state dict may be nested, and its keys may have any prefix: the entry and prefix whose keys give every one of the
    model's are taken. The model's own `load_state_dict` decides what it needs. Averaged weights have to be named or alone.

    Args:
        path: the file or folder.
        model: changed in place.
        key: the entry to take, such as "state_dict_ema".

    Raises:
        DataError: missing, unreadable, not a state dict, or of another model (which keys, which shapes).
    """
    entries = _entries(_read(path))
    if not entries:
        raise DataError(f"{path} holds no state dict of tensors", "save model.state_dict()")
    wanted = set(model.state_dict())
    found = sorted(
        (candidate for name, tensors in entries for candidate in _candidates(name, tensors, wanted)),
        key=lambda candidate: (-candidate.matching, candidate.averaged, len(candidate.beside)),
    )
    if key is not None:
        known = list(dict.fromkeys(candidate.place for candidate in found))
        found = [candidate for candidate in found if key.rstrip(".") in (candidate.key, candidate.place)]
        if not found:
            raise DataError(f"{path} has no entry {key!r} with keys of the model", f"it has {_few(known) or 'none at all'}")
    reasons = []
    for candidate in found:
        unexpected = _load(model, candidate)
        if isinstance(unexpected, str):
            reasons.append(unexpected)
        else:
            others = [other for other in found if other is not candidate and other.matching == candidate.matching]
            # Keys of this entry that another candidate is made of are named as that.
            named = tuple(other.prefix for other in others if other.key == candidate.key)
            ignored = sorted({name for name in candidate.beside if not name.startswith(named)} | set(unexpected))
            return Imported(path.name, candidate.key, candidate.prefix, ignored, [_named(other, candidate) for other in others])
    problems = mismatches(found[0].tensors if found else entries[0][1], model.state_dict()) or reasons[:1]
    raise DataError(f"{path} does not fit the model:\n{joined_lines(problems)}", "check task.model and task.model_args")


def _candidates(name: str, tensors: dict[str, Any], wanted: set[str]) -> Iterator[_Candidate]:
    """An entry under every prefix that turns one of its keys into one of the model's, in the order of its keys."""
    plain = {WRAPPERS.sub("", key): value for key, value in tensors.items()}
    if len(plain) < len(tensors) or wanted <= tensors.keys():
        plain = tensors
    prefixes = dict.fromkeys([""])
    for key in plain:
        parts = key.split(".")
        ends = ((".".join(parts[:cut]), ".".join(parts[cut:])) for cut in range(1, len(parts)))
        prefixes |= dict.fromkeys(f"{before}." for before, after in ends if after in wanted)
    for prefix in prefixes:
        cut = {key.removeprefix(prefix): value for key, value in plain.items() if key.startswith(prefix)}
        cut = _with_versions(cut, getattr(tensors, "_metadata", {}), prefix)
        matching = len(wanted & cut.keys())
        if matching:
            yield _Candidate(name, prefix, cut, [key for key in plain if not key.startswith(prefix)], matching)


def _named(other: _Candidate, taken: _Candidate) -> str:
    """How to ask for another candidate: by its entry, where that tells it from what was taken."""
    return other.key if other.key and other.key != taken.key else other.place


def _with_versions(tensors: dict[str, Any], versions: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A state dict with the versions of its modules, names cut as its keys are."""
    found = collections.OrderedDict(tensors)
    names = {WRAPPERS.sub("", f"{name}."): version for name, version in versions.items()}
    if versions:
        found._metadata = {name.removeprefix(prefix).rstrip("."): v for name, v in names.items() if name.startswith(prefix)}
    return found


def _load(model: nn.Module, candidate: _Candidate) -> list[str] | str:
    """Load a candidate: the keys that the model has no use for; or, as text, why it does not."""
    tensors = copy.copy(candidate.tensors)
    _fill_tied(tensors, model)
    try:
        with user_code("load_state_dict()"):
            found = model.load_state_dict(tensors, strict=False)
    except TaskError as error:
        return error.message
    missing, unexpected = (list(getattr(found, f"{name}_keys", [])) for name in ("missing", "unexpected"))
    return f"load_state_dict() misses {_few(missing)}" if missing else unexpected


def _entries(found: Any, name: str = "", depth: int = 0) -> list[tuple[str, dict[str, Any]]]:
    """The dicts with tensors in a checkpoint, by the keys that lead to them: the outermost first."""
    if isinstance(found, (tuple, list)):
        found = dict(enumerate(found))
    if not isinstance(found, Mapping) or depth > DEEPEST:
        return []
    tensors: dict[str, Any] = {}
    for key, value in found.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            tensors[str(key)] = torch.as_tensor(value)
        elif isinstance(value, Tensor) or str(key).endswith("_extra_state"):
            tensors[str(key)] = value
    # Versions of modules, by which they read older files.
    tensors = _with_versions(tensors, getattr(found, "_metadata", {}))
    here = [(name, tensors)] if tensors else []
    for key, value in found.items():
        here += _entries(value, f"{name}.{key}" if name else str(key), depth + 1)
    return here


def _read(path: Path) -> Any:
    """What a file or its shards hold, as nested dicts."""
    files = weight_files(path)
    if not files[0].is_file():
        raise DataError(f"{path} is missing", SETTING_HINT)
    if not files[0].name.endswith(INDEX):
        return _read_file(files[0])
    found: dict[str, Any] = {}
    for shard in files[1:]:
        part = _read_file(shard)
        if not isinstance(part, Mapping):
            raise DataError(f"{shard} holds {type(part).__name__}, expected a dict of tensors", "save model.state_dict()")
        found |= part
    return found


def _read_file(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_tensors(path, DataError)
    try:
        with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises many kinds here; its advice to load with weights_only=False would run the file's code.
        said = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip() or type(error).__name__
        if "TorchScript" in said:
            hint = 'save its weights alone: torch.save(torch.jit.load(FILE).state_dict(), "weights.pt")'
            raise DataError(f"{path} is a TorchScript archive, which holds code", hint) from error
        if found := re.search(r"GLOBAL ([\w.]+)", said):
            raise DataError(f"{path} holds a {found[1]}, which cannot be read without running code", SAVE_HINT) from error
        raise DataError(
            f"{path} cannot be read as weights alone: {said.splitlines()[0].split('. ')[0]}",
            "save model.state_dict(), best as safetensors",
        ) from error


def _harmless() -> list[Callable[..., Any] | tuple[Any, str]]:
    """What checkpoints often hold beside tensors, and what building it cannot do harm: numpy's numbers and arrays, options of a
    command line, paths."""
    core = np._core if hasattr(np, "_core") else np.core
    scalar, reconstruct = core.multiarray.scalar, core.multiarray._reconstruct
    named = [(scalar, f"numpy.{place}.multiarray.scalar") for place in ("core", "_core")]
    named += [(reconstruct, f"numpy.{place}.multiarray._reconstruct") for place in ("core", "_core")]
    dtypes = [type(np.dtype(kind)) for kind in "efdbhilqBHILQ?US"]
    paths = [(pathlib.PurePosixPath, f"pathlib.{name}") for name in ("PosixPath", "PurePosixPath", "_local.PosixPath")]
    return [
        np.ndarray,
        np.dtype,
        *dtypes,
        *named,
        argparse.Namespace,
        collections.defaultdict,
        *paths,
        int,
        float,
        str,
        list,
        dict,
    ]


def _fill_tied(tensors: dict[str, Any], model: nn.Module) -> None:
    """Give a tied name that the file leaves out the tensor of its twin."""
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    by_place = {id(value): name for name, value in reversed(own.items()) if name in tensors}
    for name, value in own.items():
        if name not in tensors and id(value) in by_place:
            tensors[name] = tensors[by_place[id(value)]]


def _few(names: list[str], most: int = 4) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
