"""The CUDA device a thread computes on: each has its own, at first number 0; page-locked memory and events go by it."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a device this thread's current one; on other devices than CUDA's nothing changes."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def as_here() -> Callable[[], None]:
    """What a new thread calls to have the device that is current in this one."""
    if not torch.cuda.is_initialized():
        return lambda: None
    number = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(number)
