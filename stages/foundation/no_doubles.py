"""A device without float64, mps: what becomes float64 there comes to the CPU first."""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stages.foundation.trees import Tree, tree_map

MPS = "mps"


class _DoublesOnCpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.double:
            args = (where_doubles_are(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


def doubles_for(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """While it is in force, `tensor.double()` of a tensor on mps is on the CPU; on other devices nothing changes."""
    return _DoublesOnCpu() if device.type == MPS else contextlib.nullcontext()


def where_doubles_are(tree: Tree) -> Tree:
    """Tensors that are about to be computed with in float64: those on mps come to the CPU."""
    return tree_map(lambda leaf: leaf.cpu() if leaf.device.type == MPS else leaf, tree)
