"""torch as passes under other weights need it: attention module by module, and no activations computed again."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import checkpoint

_lock, _passes = threading.Lock(), 0
_fast_path: bool = True
_generator = checkpoint._checkpoint_without_reentrant_generator


def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    """Nothing before the forward pass, and nothing after it."""
    yield


def _call(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    return function(*args)


@contextmanager
def plain_torch() -> Iterator[None]:
    """Run passes without attention's fused kernels for eval mode, and without activation checkpointing.

    Those kernels do not call the modules that they stand for, and have no batching rule. Checkpointing would compute
    activations again in the backward pass, and by then the layer has the base's weight back. What
    `torch.utils.checkpoint.checkpoint` calls inside is exchanged, because models import the function itself under names of
    their own. Both are states of the whole process: the first pass that is under way changes them, the last puts them back.
    """
    global _passes, _fast_path
    with _lock:
        _passes += 1
        if _passes == 1:
            _fast_path = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            checkpoint.CheckpointFunction.apply = staticmethod(_call)
            checkpoint._checkpoint_without_reentrant_generator = _nothing
    try:
        yield
    finally:
        with _lock:
            _passes -= 1
            if _passes == 0:
                torch.backends.mha.set_fastpath_enabled(_fast_path)
                del checkpoint.CheckpointFunction.apply
                checkpoint._checkpoint_without_reentrant_generator = _generator
