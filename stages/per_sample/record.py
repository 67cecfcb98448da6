"""What a model computed of a batch before it came to the layer, and how a later pass gets it back."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stages.foundation.errors import OcdError


class PrefixChanged(OcdError):
    """A pass did not repeat the recorded calls, or changed what they gave; its results are not to be used."""


@dataclass(frozen=True)
class Event:
    """A call that ended before the layer was reached: the submodule or torch function called, and what it returned."""

    source: Any
    result: Any


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)


def with_tensors(value: Any, new: Iterator[Tensor]) -> Any:
    """`value` with its tensors, in the order of `tensors_in`, taken from `new`."""
    if isinstance(value, Tensor):
        return next(new)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(with_tensors(part, new) for part in value))
    if isinstance(value, torch.Size):
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(with_tensors(part, new) for part in value)
    if isinstance(value, dict):
        return type(value)((key, with_tensors(part, new)) for key, part in value.items())
    return value


@dataclass
class Record:
    """What one batch of B samples gave before the layer was reached.

    Attributes:
        events: the calls, in order.
        samples: B.
        rows: for each tensor of the events how many of its rows belong to a sample, 0 where it does not depend on them; None
            where that is not known.
        copies: of tensors that the rest of the model changes in place, by their place in the order of `tensors_in`.
    """

    events: list[Event]
    samples: int
    rows: list[int] | None
    copies: dict[int, Tensor]
    versions: list[int] = field(default_factory=list)

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor of the events, as often as it occurs."""
        return [tensor for event in self.events for tensor in tensors_in(event.result)]

    def by_sample(self) -> list[Tensor] | None:
        """The tensors that depend on the samples, each (B, rows of a sample, …); None where the record cannot be divided."""
        if self.rows is None:
            return None
        found = [self.copies.get(place, tensor) for place, tensor in enumerate(self.tensors)]
        if any(rows and len(tensor) != self.samples * rows for tensor, rows in zip(found, self.rows, strict=True)):
            return None
        return [tensor.unflatten(0, (self.samples, rows)) for tensor, rows in zip(found, self.rows, strict=True) if rows]

    def touched(self) -> set[int]:
        """The places of the tensors that were changed since, other than those replayed as copies."""
        pairs = zip(self.tensors, self.versions, strict=True)
        return {
            place for place, (tensor, version) in enumerate(pairs) if tensor._version != version and place not in self.copies
        }

    def _results(self, sliced: list[Tensor] | None) -> list[Any]:
        """What each event returns in one pass: one fresh copy for each tensor that the pass changes."""
        fresh: dict[int, Tensor] = {}
        slices = iter(sliced or ())
        stream = []
        for place, tensor in enumerate(self.tensors):
            if sliced is not None and self.rows[place]:
                tensor = next(slices)
                tensor = tensor.clone() if place in self.copies else tensor
            elif place in self.copies:
                tensor = fresh.setdefault(id(tensor), self.copies[place].clone())
            stream.append(tensor)
        tensors = iter(stream)
        return [with_tensors(event.result, tensors) for event in self.events]

    @contextmanager
    def replaying(self, sliced: list[Tensor] | None = None) -> Iterator[None]:
        """Let a model's forward pass return the record where it would compute it again.

        Args:
            sliced: inside torch.vmap, one sample's part of `by_sample()`.

        Raises:
            PrefixChanged: other calls came than were recorded, or the pass changed what they gave.
        """
        replayer = _Replayer(self.events, self._results(sliced))
        with ExitStack() as stack:
            for module in {
                id(event.source): event.source for event in self.events if isinstance(event.source, nn.Module)
            }.values():
                stack.enter_context(watched(module, replayer.call))
            with replayer:
                yield
        replayer.require_end()
        if sliced is None and self.touched():
            raise PrefixChanged("the model changed in place what it had computed before the layer")


class _Replayer(TorchFunctionMode):
    """Returns recorded results in order."""

    def __init__(self, events: list[Event], results: list[Any]) -> None:
        super().__init__()
        self._events, self._results, self._next = events, results, 0

    def _due(self, source: Any) -> bool:
        return self._next < len(self._events) and self._events[self._next].source == source

    def _take(self) -> Any:
        self._next += 1
        return self._results[self._next - 1]

    def call(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """A submodule's forward pass."""
        if self._due(module):
            return self._take()
        if self._next < len(self._events):
            raise PrefixChanged(f"{type(module).__name__} was not called in its turn")
        return forward(*args, **named)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if self._due(func):
            return self._take()
        result = func(*args, **(kwargs or {}))
        # Shapes, dtypes and numbers are read anew; what makes tensors must be in the record.
        if self._next < len(self._events) and next(tensors_in(result), None) is not None:
            raise PrefixChanged(f"{func} was not called in its turn")
        return result

    def require_end(self) -> None:
        """Everything recorded was asked for."""
        if self._next < len(self._events):
            raise PrefixChanged("the model came to the layer by another way")


@contextmanager
def watched(module: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Let `call(module, forward, args, named)` stand for the module's forward pass."""
    if isinstance(module, torch.jit.ScriptModule):
        yield
        return
    forward = module.forward
    replaced = vars(module).get("forward")
    module.forward = lambda *args, **named: call(module, forward, args, named)
    try:
        yield
    finally:
        if replaced is None:
            del module.forward
        else:
            module.forward = replaced
