"""Skipping the prefix: what a model computes of its input before it comes to the layer is recorded once and then replayed.

In the first pass over a batch everything that ends before the layer is first used is recorded: the output of every submodule
whose call ends by then (a parent's record replaces its children's) and, between submodules, the result of every torch
function. In later passes the same calls return their record instead of computing. This follows the model's own control flow and
needs no tracing. A call that does not match the record is an error, never a guess.

Tensors keep their identity, so what works in place before the layer (`h += …`) is as it was when the layer was reached. What is
changed in place after that is found by torch's version counters and replayed as a fresh copy each time.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stages.foundation.trees import Tree, batch_size, take
from stages.per_sample.layer import Layer
from stages.per_sample.record import Event, Record, tensors_in, watched


class _Recorder(TorchFunctionMode):
    """Notes calls until the layer is reached."""

    def __init__(self, layer_module: nn.Module, parameter: Tensor, touched: set[int]) -> None:
        super().__init__()
        self._layer_module, self._parameter, self._touched = layer_module, parameter, touched
        self.events: list[Event] = []
        self._known: dict[int, int] = {}
        self.foreign = False
        self.versions: list[int] | None = None
        self.copies: dict[int, Tensor] = {}

    @property
    def reached(self) -> bool:
        """Whether the layer has been reached."""
        return self.versions is not None

    def _reach(self) -> None:
        tensors = [tensor for event in self.events for tensor in tensors_in(event.result)]
        self.versions = [tensor._version for tensor in tensors]
        made: dict[int, Tensor] = {}
        for place in self._touched & set(range(len(tensors))):
            tensor = tensors[place]
            if id(tensor) not in made:
                made[id(tensor)] = tensor.clone()
            self.copies[place] = made[id(tensor)]

    def _note(self, source: Any, result: Any) -> None:
        self.events.append(Event(source, result))
        for tensor in tensors_in(result):
            self._known[id(tensor)] = self._known.get(id(tensor), 0) + 1

    def _forget(self, start: int) -> None:
        for event in self.events[start:]:
            for tensor in tensors_in(event.result):
                self._known[id(tensor)] -= 1
        del self.events[start:]

    def call(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """A submodule's forward pass."""
        if not self.reached and module is self._layer_module:
            self._reach()
        if self.reached:
            return forward(*args, **named)
        start = len(self.events)
        result = forward(*args, **named)
        if not self.reached:
            inner = self.events[start:]
            self._forget(start)
            self._note(module, result)
            del inner  # kept until now, so that no identity was given twice
        return result

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.reached:
            return func(*args, **kwargs)
        given = list(tensors_in((args, kwargs)))
        if any(tensor is self._parameter for tensor in given):
            if not _is_reading(func):
                self._reach()
            return func(*args, **kwargs)
        before = [tensor._version for tensor in given]
        result = func(*args, **kwargs)
        changed = [tensor for tensor, version in zip(given, before, strict=True) if tensor._version != version]
        self.foreign |= any(not self._known.get(id(tensor)) for tensor in changed)
        if changed or next(tensors_in(result), None) is not None:
            self._note(func, result)
        return result


def _is_reading(func: Any) -> bool:
    """Whether a function only looks at a tensor's attributes (`weight.shape`, `weight.device`)."""
    return getattr(func, "__name__", "") == "__get__"


class Prefix:
    """Records the prefix of one layer of one model; made by `Prefix.probe`.

    Args:
        model: the model, in eval mode, frozen.
        layer: the selected layer.
        sources: the calls of the probe, in order.
        rows: as `Record.rows`, for a pass with those calls.
        touched: the places of tensors that the rest of the model changes in place.
    """

    def __init__(self, model: nn.Module, layer: Layer, sources: list[Any], rows: list[int] | None, touched: set[int]) -> None:
        self._model, self._layer, self._sources, self._rows, self._touched = model, layer, sources, rows, touched

    @property
    def is_empty(self) -> bool:
        """Nothing is computed before the layer."""
        return all(getattr(source, "__name__", "") in ("clone", "to") for source in self._sources)

    @classmethod
    def probe(cls, model: nn.Module, layer: Layer, run: Callable[[Tree], Tree], x: Tree) -> "Prefix | None":
        """Learn from two samples, and from three, what a pass looks like.

        Args:
            run: the forward pass of the model, inputs (B, …) to outputs.
            x: at least one sample, (B, …).

        Returns:
            None where the prefix cannot be replayed.
        """
        count = batch_size(x)
        batches = [take(x, torch.arange(size) % count) for size in (2, 3)]
        first = cls(model, layer, [], None, set())
        found = [first.record(lambda batch=batch: run(batch), batch)[1] for batch in batches]
        if any(record is None for record in found):
            return None
        touched = set().union(*(record.touched() for record in found))
        if _overlap(found[0].tensors, touched):
            return None
        sources = [[event.source for event in record.events] for record in found]
        rows = _rows([record.tensors for record in found]) if sources[0] == sources[1] else None
        return cls(model, layer, sources[0], rows, touched)

    def record(self, run: Callable[[], Tree], x: Tree) -> tuple[Tree, Record | None]:
        """Run the model once and record the prefix.

        Args:
            run: a forward pass of the model.
            x: its input, (B, …).

        Returns:
            what `run` returned, and the record, or None where this pass cannot be replayed.
        """
        parameter = self._model.get_parameter(self._layer.name)
        recorder = _Recorder(self._layer.module(self._model), parameter, self._touched)
        with ExitStack() as stack:
            for module in list(self._model.modules()):
                stack.enter_context(watched(module, recorder.call))
            with recorder, torch.no_grad():
                result = run()
        if recorder.foreign or recorder.versions is None:
            return result, None
        same = [event.source for event in recorder.events] == self._sources
        record = Record(recorder.events, batch_size(x), self._rows if same else None, recorder.copies, recorder.versions)
        if self._sources and record.touched():
            return result, None
        return result, record


def _overlap(tensors: list[Tensor], touched: set[int]) -> bool:
    """Whether a tensor that gets changed shares its memory with another one of the record, so that a copy would part them."""
    changed = {id(tensors[place]): tensors[place].untyped_storage().data_ptr() for place in touched}
    return any(
        tensor.untyped_storage().data_ptr() in changed.values() and id(tensor) not in changed for tensor in tensors
    ) or len(set(changed.values())) < len(changed)


def _rows(passes: list[list[Tensor]]) -> list[int] | None:
    """Rows of a sample for each tensor, from passes over two samples and over three; None where one does not
    divide, or where more samples are more tensors."""
    found = []
    if len(passes[0]) != len(passes[1]):
        return None
    for two, three in zip(*passes, strict=True):
        if two.shape == three.shape:
            found.append(0)
        elif (
            two.dim() and two.shape[1:] == three.shape[1:] and two.shape[0] * 3 == three.shape[0] * 2 and two.shape[0] % 2 == 0
        ):
            found.append(two.shape[0] // 2)
        else:
            return None
    return found
