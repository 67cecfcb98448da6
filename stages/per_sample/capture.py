"""Capturing I(x) (Eq. 7) from any model, unchanged, by hooks on the selected layer's module."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stages.foundation.errors import TaskError
from stages.foundation.trees import Tree, batch_size, flat_output, leaves
from stages.per_sample.layer import Layer
from stages.per_sample.weights import Forward, plain

LAYER_INPUT, ACTIVATION, BASE_OUTPUT = "layer_input", "activation", "base_output"
FIELDS = (LAYER_INPUT, ACTIVATION, BASE_OUTPUT)
WIDEST = 4096


def capture(
    model: nn.Module, layer: Layer, forward: Forward, x: Tree, watched: Sequence[str] = ()
) -> tuple[Tree, dict[str, Tensor]]:
    """Run the base and keep what its selected layer sees and gives, I(x) = [i_L(x), a_L(x), f_θ(x)] (Eq. 7).

    Args:
        model: the base, in eval mode.
        layer: the selected layer; of several calls in one pass, the last counts.
        forward: the task's forward pass.
        x: inputs (B, …).
        watched: further submodules, by name, whose outputs are kept, too.

    Returns:
        the output (B, …), and the fields layer_input, activation, base_output and those of `watched` (a dot in a name becomes
        an underscore), each (B, …), not yet pooled.

    Raises:
        TaskError: the layer's module or a watched one is not called or does not exist, or its rows do not divide into B
            samples.
    """
    others = watched_modules(model, watched)
    with _hooked(layer.module(model), others) as seen, torch.no_grad():
        output = plain(forward)(model, x)
    if seen.get(LAYER_INPUT) is None or seen.get(ACTIVATION) is None:
        raise TaskError(
            f"the module of {layer.name} is not called in the forward pass, so it has no input to condition on",
            "choose another layer with --set select-layer.layer=NAME, or in ocd.toml",
        )
    if absent := [name for name in others if seen.get(name) is None]:
        raise TaskError(f"the watched module {absent[0]} gives no tensor in the forward pass", "mend `watched` of the task")
    fields = {name: _per_sample(value, batch_size(x), layer.name) for name, value in seen.items()}
    whole = list(leaves(output).values())
    return output, fields | {BASE_OUTPUT: whole[0] if len(whole) == 1 and whole[0].dim() > 1 else flat_output(output)}


@contextmanager
def _hooked(module: nn.Module, others: dict[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """What the layer's module sees and gives, and what others give, by field, once a pass has been run."""
    seen: dict[str, Any] = {}

    def keep_input(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen[LAYER_INPUT] = _first_tensor([*args, *named.values()])

    def keep_output(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen[name] = _first_tensor([output])

    handles = [module.register_forward_pre_hook(keep_input, with_kwargs=True)]
    for name, one in {ACTIVATION: module, **others}.items():
        # Its own output, before other hooks have it.
        handles.append(one.register_forward_hook(functools.partial(keep_output, name), prepend=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def watched_modules(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that a task watches, by the names of their fields.

    Raises:
        TaskError: one does not exist, or has the field of another.
    """
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TaskError(f"watched = {names!r}: expected names of modules", 'for example: watched = ("encoder.norm",)')
    modules, found = {name: module for name, module in model.named_modules() if name}, {}
    for name in names:
        field = name.replace(".", "_")
        if name not in modules or field in (*FIELDS, *found):
            why = "has no module of that name" if name not in modules else f"would have two fields called {field}"
            raise TaskError(f"watched = {name!r}: the model {why}", f"it has {', '.join(modules)[:200]}")
        found[field] = modules[name]
    return found


def _first_tensor(values: list[Any]) -> Tensor | None:
    """The first tensor among arguments or outputs, copied at once: what follows in the model may work in place."""
    found = (leaf for value in values for leaf in leaves(value).values() if isinstance(leaf, Tensor))
    return next((leaf.detach().clone() for leaf in found), None)


def _per_sample(value: Tensor, count: int, name: str) -> Tensor:
    if value.dim() and value.shape[0] == count:
        return value
    if value.dim() == 0 or value.shape[0] % count:
        raise TaskError(
            f"the input of {name} has shape {tuple(value.shape)} for a batch of {count}: the sample is not on its first axis",
            "choose another layer with --set select-layer.layer=NAME, or in ocd.toml",
        )
    return value.reshape(count, -1, *value.shape[1:])


def reduce_fields(
    fields: dict[str, Tensor], layer_kind: type[nn.Module], reduce: Callable[[str, Tensor], Tensor | None]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Make fields wider than 4,096 numbers smaller: by the task's `reduce`, else by their mean over all but the feature axis.

    Args:
        fields: name to (B, …).
        layer_kind: the type of the layer's module; a convolution's features lie on axis 1, as a
            picture's do, others' on the last.
        reduce: the task's method.

    Returns:
        the fields, float32, and for each one that was made smaller how.
    """
    found, notes = {}, {}
    for name, value in fields.items():
        reduced = reduce(name, value)
        if reduced is not None:
            value, notes[name] = reduced, "reduced by the task"
        elif value.dim() > 2 and value[0].numel() > WIDEST:
            pictures = issubclass(layer_kind, nn.modules.conv._ConvNd) or (name == BASE_OUTPUT and value.dim() > 3)
            axis = 1 if pictures else value.dim() - 1
            others = [a for a in range(1, value.dim()) if a != axis]
            notes[name] = f"mean over axes {others} of {tuple(value.shape[1:])}"
            value = value.mean(others)
        found[name] = value.float()
    return found, notes
