"""Activation checkpointing, switched off for passes under other weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils import checkpoint


def _generator(*_: Any, **__: Any) -> Iterator[None]:
    """Nothing before the forward pass, and nothing after it."""
    yield


def _call(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    return function(*args)


@contextmanager
def activations_kept() -> Iterator[None]:
    """Let `torch.utils.checkpoint.checkpoint` call its function and keep the activations.

    It would compute them again in the backward pass, and by then the layer has the base's weight back. What it calls inside is
    exchanged, because models import the function itself under names of their own.
    """
    generator = checkpoint._checkpoint_without_reentrant_generator
    checkpoint.CheckpointFunction.apply, checkpoint._checkpoint_without_reentrant_generator = staticmethod(_call), _generator
    try:
        yield
    finally:
        checkpoint._checkpoint_without_reentrant_generator = generator
        del checkpoint.CheckpointFunction.apply
