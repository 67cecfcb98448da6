"""The same bytes again on a GPU: kernels that add in a fixed order."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Take torch's deterministic algorithms on a GPU: some kernels, such as attention's backward pass, otherwise add up in the
    order in which their parts are ready. What has no such algorithm runs as it is, and torch warns of it."""
    if device.type != "cuda":
        yield
        return
    before, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling costs time and shows what reads memory that nobody wrote, which is no purpose of ours.
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fills
