"""The least and the largest number of a tensor that was in host memory before it went to a GPU: whoever has to know them need
not wait for the GPU to tell."""

import torch
from torch import Tensor

# An attribute of the tensor, so that it goes when the tensor does.
_NAME = "_ocd_bounds"
# Labels are few; of pictures and the like nobody asks.
MOST_INTEGERS, MOST_FLOATS = 1 << 22, 1 << 16


def note_bounds(tensor: Tensor, source: Tensor) -> Tensor:
    """Remember of a tensor what numbers its source, in host memory, has.

    Args:
        tensor: numbers of the source, all or some, on another device.
        source: a tensor in host memory.

    Returns:
        the tensor.
    """
    most = MOST_FLOATS if source.is_floating_point() else MOST_INTEGERS
    if 0 < source.numel() <= most and source.dtype != torch.bool and not source.is_complex():
        least, largest = source.aminmax()
        keep_bounds(tensor, least.item(), largest.item())
    return tensor


def keep_bounds(tensor: Tensor, least: float, largest: float) -> None:
    """Remember that no number of a tensor is outside of these, for as long as nobody writes to it."""
    if not tensor.is_inference():
        setattr(tensor, _NAME, (tensor._version, least, largest))


def are_within(tensor: Tensor, least: float, largest: float) -> bool:
    """Whether it is known, without looking, that no number of a tensor (or of what it is a view of) is outside of these."""
    for known in (tensor, tensor._base):
        version, *bounds = getattr(known, _NAME, (None,))
        # A tensor and its views count together how often they were written to.
        if version is not None and version == known._version:
            return least <= bounds[0] and bounds[1] <= largest
    return False
