"""How much memory training a denoiser takes, found without taking it."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from stages.diffusion.denoiser import Denoiser
from stages.diffusion.unet import UNetDenoiser

# Weights, gradients, two moments and the average, in float32; autocast keeps the weights in bfloat16, too.
BYTES_PER_PARAMETER, OF_HALF = 20, 2


def parameters(denoiser: Denoiser) -> int:
    """Numbers that are trained or kept."""
    return sum(p.numel() for p in denoiser.parameters())


def activation_bytes(denoiser: Denoiser, half: bool = False) -> int:
    """Bytes that one sample takes in a training step: what autograd keeps for the backward pass, the largest tensors in flight,
    and the deltas and noise that the loss is made of.

    The pass runs on torch's meta device, where tensors have shapes and no memory.

    Args:
        denoiser: on the meta device.
        half: under bfloat16 autocast. A U-Net computes in it throughout; the other denoisers' norms work in float32.
    """
    wholly = half and isinstance(denoiser, UNetDenoiser)
    if wholly:
        denoiser = copy.deepcopy(denoiser).bfloat16()
    own = {p.untyped_storage()._cdata for p in denoiser.parameters()}
    kept: dict[int, Tensor] = {}
    largest = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal largest
        key = tensor.untyped_storage()._cdata
        if key not in own:
            kept[key] = tensor  # held, so that no storage gets another's place
            largest = max(largest, tensor.untyped_storage().nbytes())
        return tensor

    rows = 2
    with torch.enable_grad(), _FusedAttention(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = _pass(denoiser, rows, torch.bfloat16 if wholly else torch.float32).float()
    own_bytes = output.untyped_storage().nbytes()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    whole = (total + 3 * max(largest, own_bytes) + 4 * own_bytes) // rows
    # As measured of the dense ones.
    return whole * 9 // 10 if half and not wholly else whole


def training_bytes(denoiser: Denoiser, micro_batch: int, half: bool = False) -> int:
    """Bytes that training takes: everything kept for each parameter, and a micro-batch's activations."""
    each = BYTES_PER_PARAMETER + (OF_HALF if half else 0)
    return each * parameters(denoiser) + micro_batch * activation_bytes(denoiser, half)


def operations(denoiser: Denoiser) -> int:
    """Multiplications of one sample's pass, of a denoiser on the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _pass(denoiser, 1)
    return counter.get_total_flops() // 2


def _pass(denoiser: Denoiser, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.device("meta"):
        fields = {name: torch.empty(rows, width, dtype=dtype) for name, width in denoiser.encoder.normalise.widths.items()}
        noisy, t = torch.empty(rows, *denoiser.shape, dtype=dtype), torch.zeros(rows, dtype=torch.long)
        return denoiser(noisy, t, denoiser.encode(fields))


class _FusedAttention(TorchFunctionMode):
    """Attention as CPUs and GPUs compute it, without a matrix of all positions by all positions; the meta device keeps one."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and len(args) == 3 and not kwargs:
            return _KeptByAttention.apply(*args)
        return func(*args, **(kwargs or {}))


class _KeptByAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, output)
        return output
