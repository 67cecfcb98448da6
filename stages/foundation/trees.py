"""x, y and outputs are tensors, or tuples, lists, dicts or dataclasses of them: the few operations that all forms need."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stages.foundation.bounds import note_bounds
from stages.foundation.current_device import on
from stages.foundation.errors import TaskError

# A Tensor; or a tuple, list, dict or dataclass of trees, of whatever class, which is kept. An entry may be None.
Tree = Any
# Page-locked memory takes time to get, and is not given back before the process ends.
MOST_PAGE_LOCKED = 64 << 20


def parts_of(tree: Tree) -> dict[Any, Tree] | None:
    """The entries of a tree by their key, index or field; None for a tensor, or whatever else is no tree of its own."""
    if isinstance(tree, Mapping):
        return dict(tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    if isinstance(tree, (tuple, list)) and not isinstance(tree, torch.Size):
        return dict(enumerate(tree))
    return None


def _with_parts(tree: Tree, parts: dict[Any, Tree]) -> Tree:
    """A tree of the same class with other entries.

    Raises:
        TaskError: its class cannot be copied.
    """
    kind = type(tree)
    if kind is dict:
        return parts
    try:
        if isinstance(tree, (tuple, list)):
            # A namedtuple takes its fields one by one.
            return kind(*parts.values()) if hasattr(tree, "_fields") else kind(list(parts.values()))
        made = copy.copy(tree)
        if isinstance(tree, Mapping):
            for key, value in parts.items():
                made[key] = value
    except Exception as error:
        raise TaskError(
            f"a {kind.__name__} cannot be copied: {type(error).__name__}: {error}", "return a dict, a tuple or a dataclass"
        ) from error
    # Dicts whose entries are attributes, too, keep them in step; fields of a frozen dataclass can be set no other way.
    new = {id(old): parts[key] for key, old in parts_of(tree).items()}
    names = parts if dataclasses.is_dataclass(tree) else vars(tree) if hasattr(tree, "__dict__") else ()
    for name in names:
        if id(getattr(tree, name)) in new:
            object.__setattr__(made, name, new[id(getattr(tree, name))])
    return made


def tree_map(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """Apply `function` to every tensor of `tree` (and the tensors at the same places of `others`); None stays None."""
    if tree is None:
        return None
    parts = parts_of(tree)
    if parts is None:
        return function(tree, *others)
    rest = [parts_of(other) for other in others]
    return _with_parts(tree, {key: tree_map(function, value, *(other[key] for other in rest)) for key, value in parts.items()})


def leaves(tree: Tree) -> dict[str, Tensor]:
    """Every tensor of `tree` by its path: "" for a lone tensor, "logits", "0", "0.hidden"."""
    parts = parts_of(tree)
    if parts is None:
        return {} if tree is None else {"": tree}
    return {f"{key}.{path}".rstrip("."): leaf for key, value in parts.items() for path, leaf in leaves(value).items()}


def as_tree(like: Tree, tensors: Sequence[Tensor]) -> Tree:
    """A tree of the form of `like`, of other tensors in the order of `leaves`."""
    following = iter(tensors)
    return tree_map(lambda _: next(following), like)


def batch_size(tree: Tree) -> int:
    """Length of the first axis of the first tensor."""
    return next(iter(leaves(tree).values())).shape[0]


def take(tree: Tree, rows: slice | Tensor) -> Tree:
    """Rows of every tensor along the first axis."""
    return tree_map(lambda leaf: leaf[rows], tree)


def concatenate(trees: Sequence[Tree]) -> Tree:
    """Join batches along the first axis."""
    return tree_map(lambda *parts: torch.cat(parts), *trees)


def to_device(tree: Tree, device: torch.device) -> Tree:
    """Move every tensor to a device; nobody waits for a GPU, which copies when it comes to it."""
    return tree_map(lambda leaf: _moved(leaf, device), tree)


def _moved(leaf: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. For a GPU it is first copied to page-locked memory of our own, from which the GPU reads while the
    host goes on: the tensor given may be changed at once."""
    if device.type != "cuda" or leaf.device.type != "cpu" or leaf.layout != torch.strided:
        return leaf.to(device)
    # What is broadcast has no memory of its own to be locked.
    if not 0 < leaf.nbytes <= MOST_PAGE_LOCKED or 0 in leaf.stride() or leaf.is_pinned():
        return note_bounds(leaf.to(device), leaf)
    with on(device):
        return note_bounds(leaf.pin_memory().to(device, non_blocking=True), leaf)


def repeat_batch(tree: Tree, times: int) -> Tree:
    """Repeat the whole batch `times` times: (B, …) to (times·B, …)."""
    return tree_map(lambda leaf: leaf.repeat(times, *[1] * (leaf.dim() - 1)), tree)


def flat_output(output: Tree) -> Tensor:
    """One vector a sample: (B, …) to (B, W), the tensors of a tuple or dict side by side."""
    return torch.cat([leaf.flatten(1) if leaf.dim() > 1 else leaf.unsqueeze(1) for leaf in leaves(output).values()], dim=1)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with its tensors changed; what else is in there stays as it is."""
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, value)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts, in the order of `map_tensors`."""
    parts = parts_of(value)
    if parts is not None:
        for part in parts.values():
            yield from tensors_in(part)
    elif isinstance(value, Tensor):
        yield value
