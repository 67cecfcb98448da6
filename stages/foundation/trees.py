"""x, y and outputs are tensors, or tuples or dicts of them: the few operations that all three forms need."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Tree = Any  # a Tensor, or a tuple, list or dict of trees


def tree_map(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """Apply `function` to every tensor of `tree` (and the tensors at the same places of `others`)."""
    if isinstance(tree, dict):
        return {key: tree_map(function, value, *(other[key] for other in others)) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(tree_map(function, *values) for values in zip(tree, *others, strict=True))
    return function(tree, *others)


def leaves(tree: Tree) -> dict[str, Tensor]:
    """Every tensor of `tree` by its path: "" for a lone tensor, "logits", "0", "0.hidden"."""
    if isinstance(tree, (dict, tuple, list)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {f"{key}.{path}".rstrip("."): leaf for key, value in items for path, leaf in leaves(value).items()}
    return {"": tree}


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
    """Move every tensor to a device."""
    return tree_map(lambda leaf: leaf.to(device), tree)


def repeat_batch(tree: Tree, times: int) -> Tree:
    """Repeat the whole batch `times` times: (B, …) to (times·B, …)."""
    return tree_map(lambda leaf: leaf.repeat(times, *[1] * (leaf.dim() - 1)), tree)


def flat_output(output: Tree) -> Tensor:
    """One vector a sample: (B, …) to (B, W), the tensors of a tuple or dict side by side."""
    return torch.cat([leaf.flatten(1) if leaf.dim() > 1 else leaf.unsqueeze(1) for leaf in leaves(output).values()], dim=1)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with its tensors changed: those in nested tuples, lists and dicts of any kind, which keep their kind; what else
    is in there stays as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return type(value)((key, map_tensors(function, part)) for key, part in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, part) for part in value))
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return type(value)(map_tensors(function, part) for part in value)
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts, in the order of `map_tensors`."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)
