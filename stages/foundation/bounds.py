"""The least and the largest number of a tensor that was in host memory before it went to a GPU: whoever has to know them need
not wait for the GPU to tell."""

import torch
from torch import Tensor

# An attribute of the tensor, so that it goes when the tensor does.
_NAME = "_ocd_bounds"
# Labels are few; of pictures and the like nobody asks.
INTEGERS, FLOATS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64), (torch.float32, torch.float64)
MOST = dict.fromkeys(INTEGERS, 1 << 22) | dict.fromkeys(FLOATS, 1 << 16)


def note_bounds(tensor: Tensor, source: Tensor) -> Tensor:
    """Remember of a tensor what numbers its source, in host memory, has.

    Args:
        tensor: numbers of the source, all or some, on another device.
        source: a tensor in host memory.

    Returns:
        the tensor.
    """
    if 0 < source.numel() <= MOST.get(source.dtype, 0):
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
