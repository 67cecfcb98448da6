"""What one sample takes in a pass of a model: memory and floating-point operations."""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from stages.foundation.errors import OcdError
from stages.foundation.trees import Tree, batch_size
from stages.per_sample.layer import Layer
from stages.per_sample.prefix import Record
from stages.per_sample.weights import Bound, Forward

# Batches whose weights and activations fit the cache beat larger ones.
CACHE_BYTES = 64 << 20


def recorded_bytes(record: Record | None, x: Tree) -> int:
    """Memory of one sample of x in the record of what comes before the layer, and in the copy that a pass works on."""
    return 2 * sum(tensor.nbytes for tensor in record.tensors) // batch_size(x) if record is not None else 0


def largest_output(model: nn.Module, forward: Forward, x: Tree) -> int:
    """Bytes of the largest tensor that a module of the model gives, for one sample."""
    largest = 0

    def look(module: nn.Module, given: tuple[object, ...], output: object) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, output.numel() * output.element_size())

    handles = [module.register_forward_hook(look) for module in model.modules()]
    try:
        with torch.no_grad():
            forward(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return largest // batch_size(x)


def activation_bytes(model: nn.Module, layer: Layer, forward: Forward, x: Tree) -> int:
    """Bytes that autograd keeps of one sample for the gradient in the layer's weight; 0 where it cannot be told."""
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaf = layer.weight(model).clone().requires_grad_()
    named = {f"model.{layer.name}": leaf}
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = functional_call(Bound(model, forward), named, (x,))
        del output
    except (OcdError, RuntimeError):
        return 0
    known = (p for p in (*model.parameters(), *model.buffers(), leaf) if p.layout == torch.strided)
    ours = {p.untyped_storage().data_ptr() for p in known}
    return sum(size for place, size in seen.items() if place not in ours) // batch_size(x)


def forward_operations(model: nn.Module, forward: Forward, x: Tree) -> int:
    """Floating-point operations (products of matrices, convolutions, attention) of one sample's forward pass; two for each
    parameter where torch cannot count them."""
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            forward(model, x)
    except (OcdError, RuntimeError):
        # A model that asks for gradients itself, say.
        return 2 * sum(parameter.numel() for parameter in model.parameters())
    return counter.get_total_flops() // batch_size(x)
