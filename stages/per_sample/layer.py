"""A layer: the one weight OCD changes, by its parameter name, seen as the matrix `weight.flatten(1)`."""

import difflib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.foundation.errors import SettingsError, TaskError


@dataclass(frozen=True)
class Layer:
    """A parameter of the base with two or more axes.

    Attributes:
        name: its name in the state dict, such as "fc1.weight".
        shape: its own shape, (out, …).
    """

    name: str
    shape: tuple[int, ...]

    @property
    def module_name(self) -> str:
        """The module that owns the parameter, "" for the model itself."""
        return self.name.rpartition(".")[0]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in): the shape of `weight.flatten(1)`."""
        return self.shape[0], self.numel // self.shape[0]

    @property
    def numel(self) -> int:
        """out · in."""
        return int(torch.Size(self.shape).numel())

    def module(self, model: nn.Module) -> nn.Module:
        """The module of `model` that owns the parameter."""
        return model.get_submodule(self.module_name)

    def weight(self, model: nn.Module) -> Tensor:
        """The parameter itself, detached, in its own shape."""
        return model.get_parameter(self.name).detach()


def candidates(model: nn.Module) -> list[Layer]:
    """Every floating-point parameter with two or more axes, in the model's order; tied ones once.

    Raises:
        TaskError: there is none.
    """
    found = [
        Layer(name, tuple(p.shape))
        for name, p in model.named_parameters()
        if p.dim() >= 2 and p.is_floating_point() and p.numel()
    ]
    if not found:
        raise TaskError(
            "the model has no parameter with two or more axes",
            "OCD changes a weight matrix; a model without one has nothing to change",
        )
    return found


def find_layer(model: nn.Module, name: str) -> Layer:
    """The candidate called `name`.

    Raises:
        SettingsError: there is none of this name, or it is a vector; the candidates are listed.
    """
    # As torch.compile calls it, which is undone.
    name = name.replace("_orig_mod.", "")
    known = {layer.name: layer for layer in candidates(model)}
    names = dict(model.named_parameters(remove_duplicate=False))
    for other in known:
        # The second name of a tied weight stands for the first.
        if name in names and names[name] is names[other]:
            return known[other]
    why = f"is a vector of {names[name].numel()}" if name in names else "does not exist"
    near = difflib.get_close_matches(name, known, 1)
    offer = f" (did you mean {near[0]}?)" if near else ""
    listed = "\n".join(f"  {layer.name} {layer.shape}" for layer in known.values())
    raise SettingsError(
        f"layer {name!r} {why}{offer}; the candidates are:\n{listed}",
        f"name one of them, such as {next(iter(known))}",
    )
