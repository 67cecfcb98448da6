"""Skipping the prefix: what a model computes of its input before it comes to the layer is recorded once and then replayed.

The first pass over a batch records the output of every submodule whose call ends before the layer's begins; a parent's record
replaces its children's. In later passes those submodules return their record instead of computing. This follows the model's own
control flow and needs no tracing. A call that does not match the record is an error, never a guess. Outputs are cloned when
they are recorded and when they are replayed, because models work in place.

What the model computes between submodules it computes again; but where nothing comes of that except the inputs of submodules
that are replayed themselves, it works on a single row instead of the batch.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stages.foundation.errors import OcdError
from stages.foundation.trees import Tree, batch_size, map_tensors, take, tensors_in
from stages.per_sample.layer import Layer


class PrefixChanged(OcdError):
    """A pass did not repeat the recorded calls; its results are not to be used."""


class Spent(Tensor):
    """One row that stands for an output which nobody reads, so that what the model computes of it takes no time.

    Raises:
        PrefixChanged: it is computed with together with other tensors, or looked at: somebody reads it.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if all(isinstance(tensor, Spent) for tensor in tensors_in((args, kwargs or {}))):
            result = super().__torch_function__(func, types, args, kwargs)
            if next(tensors_in(result), None) is not None:
                return result
        raise PrefixChanged("an output that nobody read is read now")


def _spent(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor[:1] if tensor.dim() else tensor).as_subclass(Spent)


@dataclass(frozen=True)
class Record:
    """What submodules gave for one batch of B samples before the layer's call began.

    Attributes:
        calls: the submodules and what they returned, in order.
        holders: the modules that hold the layer's parameter: their call is the layer's.
        divides: each tensor has a row for each sample.
    """

    calls: list[tuple[nn.Module, Any]]
    holders: list[nn.Module]
    divides: bool

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor of the calls that somebody reads, in order."""
        found = (tensor for _, result in self.calls for tensor in tensors_in(result))
        return [tensor for tensor in found if not isinstance(tensor, Spent)]

    def without(self, modules: set[nn.Module]) -> "Record":
        """The record without what these submodules gave."""
        return replace(self, calls=[(m, map_tensors(_spent, result) if m in modules else result) for m, result in self.calls])

    def by_sample(self, samples: int) -> list[Tensor] | None:
        """The tensors as (B, 1, …), a batch of one for each sample; None where the record cannot be divided."""
        whole = self.divides and _has_rows(self.tensors, samples)
        return [tensor.unsqueeze(1) for tensor in self.tensors] if whole else None

    @contextmanager
    def replaying(self, tensors: Iterable[Tensor] | None = None) -> Iterator[None]:
        """Let a model's forward pass return the record where it would compute it again.

        Args:
            tensors: in place of the record's own: inside torch.vmap, one sample's part of `by_sample`.

        Raises:
            PrefixChanged: other calls came than were recorded, or the pass failed; without the record it may not.
        """
        left, stream = list(reversed(self.calls)), iter(self.tensors if tensors is None else tensors)

        def call(module: nn.Module, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
            if not left:
                return forward(*args, **named)
            due, result = left.pop()
            if module is not due:
                raise PrefixChanged(f"{type(module).__name__} was not called in its turn")
            return map_tensors(lambda own: (own if isinstance(own, Spent) else next(stream)).clone(), result)

        with _watched([*(module for module, _ in self.calls), *self.holders], call):
            try:
                yield
            except (OcdError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise PrefixChanged(f"the pass failed: {error}") from error
        if left:
            raise PrefixChanged("the model came to the layer by another way")


class Prefix:
    """Records the prefix of one layer of one model; made by `Prefix.probe`.

    Args:
        modules: whose outputs are recorded.
        holders: as `Record`.
        divides: as `Record`.
    """

    def __init__(self, modules: list[nn.Module], holders: list[nn.Module], divides: bool = False) -> None:
        self._modules, self._holders, self._divides = modules, holders, divides
        self._unread: set[nn.Module] = set()

    @classmethod
    def probe(cls, model: nn.Module, layer: Layer, run: Callable[[Tree], Tree], x: Tree) -> "Prefix | None":
        """Learn from two samples, and from three, which submodules are worth recording.

        Args:
            model: in eval mode, frozen.
            layer: the selected layer.
            run: the forward pass of the model, inputs (B, …) to outputs.
            x: at least one sample, (B, …).

        Returns:
            None where the layer is not called, or no submodule's call ends before.
        """
        parameter, modules = model.get_parameter(layer.name), list(model.modules())
        holders = [module for module in modules if any(p is parameter for p in module.parameters(recurse=False))]
        divides = True
        for size in (2, 3):
            batch = take(x, torch.arange(size) % batch_size(x))
            _, record = cls(modules, holders).record(functools.partial(run, batch))
            if record is None or not record.calls:
                return None
            divides = divides and _has_rows(record.tensors, size)
        return cls(list(dict.fromkeys(module for module, _ in record.calls)), holders, divides)

    def record(self, run: Callable[[], Tree]) -> tuple[Tree, Record | None]:
        """What a forward pass returns, and the record of it; None where it does not come to the layer."""
        calls, reached = [], False

        def call(module: nn.Module, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
            nonlocal reached
            reached = reached or module in self._holders
            start = len(calls)
            result = forward(*args, **named)
            if not reached:
                calls[start:] = [(module, map_tensors(_spent if module in self._unread else torch.clone, result))]
            return result

        with _watched([*self._modules, *self._holders], call), torch.no_grad():
            result = run()
        return result, Record(calls, self._holders, self._divides) if reached else None

    def spare(self, record: Record, is_right: Callable[[Record], bool]) -> None:
        """Find the submodules whose outputs nobody reads, one after another; those are not kept from then on.

        Args:
            record: of a probe batch.
            is_right: whether passes that replay a record come to the same results.
        """
        for module in self._modules:
            # Some kinds of tensors cannot be stood in for: then everything is kept.
            with suppress(PrefixChanged, RuntimeError, TypeError):
                if is_right(record.without(self._unread | {module})):
                    self._unread.add(module)


def _has_rows(tensors: list[Tensor], samples: int) -> bool:
    return all(tensor.dim() and len(tensor) == samples for tensor in tensors)


@contextmanager
def _watched(modules: list[nn.Module], call: Callable[..., Any]) -> Iterator[None]:
    """Let `call(module, forward, …)` stand for the forward pass of each module."""
    with ExitStack() as stack:
        for module in dict.fromkeys(modules):
            if not isinstance(module, torch.jit.ScriptModule):
                stack.callback(_set_forward, module, vars(module).get("forward"))
                module.forward = functools.partial(call, module, module.forward)
        yield


def _set_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        del module.forward
    else:
        module.forward = forward
