"""A layer of a half-precision base, made to compute in float32: a delta is far smaller than what half precision resolves."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stages.foundation.errors import OcdError, TaskError
from stages.foundation.trees import map_tensors
from stages.per_sample.layer import Layer

HALF = (torch.float16, torch.bfloat16)
# What a forward pass in batches may differ by from one sample at a time: rounding, of a few layers.
TOLERANCE = {torch.bfloat16: 2**-5, torch.float16: 2**-8}


def tolerance_of(model: nn.Module) -> float:
    """What outputs of a batch may differ by from those of its samples alone, as a share of their size: 1e-3, or some multiple
    of the rounding of half precision, where a model has parameters of it."""
    return max((TOLERANCE.get(parameter.dtype, 1e-3) for parameter in model.parameters()), default=1e-3)


def in_single_precision(model: nn.Module, layer: Layer, run: Callable[[], object]) -> str:
    """Make the layer's module compute in float32, its inputs and outputs cast at its border; the smallest module around it,
    where its weight is used outside its own.

    Args:
        model: the base, changed in place; nothing is done where the layer is not of half precision.
        layer: the layer.
        run: a forward pass of the model, to find out whether it works.

    Returns:
        the name of the module that computes in float32 now, "" where nothing was changed; "." is the model itself.

    Raises:
        TaskError: the model does not run, whichever module is changed.
    """
    dtype = model.get_parameter(layer.name).dtype
    if dtype not in HALF:
        return ""
    name = layer.module_name
    while True:
        undo = _make_single(model.get_submodule(name), dtype)
        try:
            with torch.no_grad():
                run()
            return name or "."
        except (OcdError, RuntimeError) as error:
            undo()
            if not name:
                raise TaskError(
                    f"the model is {str(dtype).removeprefix('torch.')}, and does not run with {layer.name} in float32: {error}",
                    "give the model in float32: model.float()",
                ) from error
            name = name.rpartition(".")[0]


def _make_single(module: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
    """Cast a module's parameters and buffers, and what goes in and out; the function returned puts everything back."""
    kept = [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers()) if tensor.dtype in HALF]
    for tensor, data in kept:
        tensor.data = data.float()

    def enter(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        return _cast(args, HALF, torch.float32), _cast(named, HALF, torch.float32)

    def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return _cast(output, (torch.float32,), dtype)

    handles = [
        module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
        module.register_forward_hook(leave),
    ]

    def undo() -> None:
        for handle in handles:
            handle.remove()
        for tensor, data in kept:
            tensor.data = data

    return undo


def _cast(value: Any, of: tuple[torch.dtype, ...], to: torch.dtype) -> Any:
    """`value` with its tensors of some dtypes cast, in nested tuples, lists and dicts."""
    return map_tensors(lambda tensor: tensor.to(to) if tensor.dtype in of else tensor, value)
