"""How many samples to overfit at once, and on how many threads: from the cache, the memory and the size of the work."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from stages.foundation.errors import OcdError
from stages.foundation.trees import Tree, batch_size
from stages.overfitting.overfitter import Engine
from stages.per_sample.layer import Layer
from stages.per_sample.runner import Runner
from stages.per_sample.weights import Bound, Forward, Loop

# Batches whose weights and activations fit the cache beat larger ones.
CACHE_BYTES = 64 << 20
SMALLEST, LARGEST = 32, 512
LARGEST_ON_GPU = 4096
LARGEST_PREDICTED = 1024
# Deltas of a batch, all members of it: the sampler goes over them several times a step, which wants them in the cache; the
# denoiser's products want many.
PREDICTED_BYTES, PREDICTED_ON_GPU = 10 << 20, 256 << 20
# Of the memory that is free, what a batch may take.
MEMORY_SHARE = 0.25
# Fewer are not worth the name of a batch, however little memory is said to be free.
LEAST, LEAST_BYTES = 8, 1 << 30
# Below this many floating-point operations in a pass over a batch, several threads wait for each other more than they compute.
SMALL_PASS = 20e6
# Half a minute of a core's work, and samples that the slow ways take about as long for.
BLOCK_OPERATIONS, SLOW_BLOCK = 1_500_000_000_000, 256
# Floating-point operations for each byte of the store, above which compressing and writing are a small part of the work.
MOSTLY_COMPUTING = 100


def sample_bytes(
    engine: Engine, layer: Layer, model: nn.Module, forward: Forward, x: Tree, of_step: Tree, *, factored: bool
) -> int:
    """Memory that one sample takes while it is overfitted: its weight with gradient, moments and a temporary (less in closed
    form, none where factors are all there is), what the backward pass keeps, the prefix's record and the largest outputs.

    Args:
        engine: overfits it.
        layer: the layer.
        model: the base.
        forward: the task's forward pass.
        x: a few inputs.
        of_step: what a gradient step uses of them.
        factored: whether deltas are kept as factors.
    """
    copies = 5 if engine.why_dense else 0 if factored else 2
    record = engine.first_pass(x).record
    recorded = _storage(record.tensors) // batch_size(x) if record is not None else 0
    kept = activation_bytes(model, layer, forward, of_step)
    return max(1, 4 * copies * layer.numel + 2 * kept + recorded + 2 * largest_output(model, forward, x))


def _storage(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


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


def auto_batch_size(engine: Engine, sample: int, rows: int, available: int | None, device: torch.device) -> int:
    """Samples at once, so that equal batches fill a block of `rows`.

    Args:
        engine: how they are overfitted; the loop takes one at a time.
        sample: bytes of one, as `sample_bytes`.
        rows: samples to a block.
        available: bytes of memory that are free, None where that is not known.
        device: where.
    """
    if isinstance(engine.way, Loop):
        return 1
    if device.type == "cuda":
        wanted = min(LARGEST_ON_GPU, int(MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]) // sample)
    else:
        wanted = min(LARGEST, max(SMALLEST, CACHE_BYTES // sample))
        if available is not None:
            wanted = min(wanted, max(min(LEAST, LEAST_BYTES // sample), int(MEMORY_SHARE * available) // sample))
    wanted = max(1, min(rows, wanted))
    return -(-rows // -(-rows // wanted))


def prediction_bytes(runner: Runner, x: Tree) -> int:
    """Memory that a sample of x takes while its members are predicted, without its deltas: the prefix's record, and the largest
    outputs."""
    record = runner.first_pass(x).record
    recorded = _storage(record.tensors) // batch_size(x) if record is not None else 0
    return recorded + 2 * largest_output(runner.model, runner.forward, x)


def prediction_batch(sample: int, numel: int, members: int, device: torch.device) -> int:
    """Samples to predict at once, with all members of each.

    Args:
        sample: bytes of one, as `prediction_bytes`.
        numel: numbers of a delta.
        members: of the ensemble.
        device: where.
    """
    deltas = (PREDICTED_ON_GPU if device.type == "cuda" else PREDICTED_BYTES) // (4 * numel * members)
    most = max(1, min(LARGEST_PREDICTED, deltas, CACHE_BYTES // sample if sample else LARGEST_PREDICTED))
    # Parts of it are chunks of sampled deltas.
    return most // 16 * 16 if most >= 16 else 1 << (most.bit_length() - 1)


def activation_bytes(model: nn.Module, layer: Layer, forward: Forward, x: Tree) -> int:
    """Bytes that autograd keeps of one sample for the gradient in the layer's weight; 0 where it cannot be told."""
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
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
    ours = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers(), leaf)}
    return sum(size for place, size in seen.items() if place not in ours) // batch_size(x)


def forward_operations(model: nn.Module, forward: Forward, x: Tree) -> int:
    """Floating-point operations (products of matrices, convolutions, attention) of one sample's forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward(model, x)
    return counter.get_total_flops() // batch_size(x)


def rows_worth_keeping(engine: Engine, operations: int) -> int:
    """Samples that take about half a minute on one core: what a kill may cost, which is the work of a block.

    Args:
        engine: how they are overfitted; the slow ways do a few hundred samples in that time.
        operations: floating-point operations of one sample's forward pass, of which there are about ten.
    """
    return BLOCK_OPERATIONS // max(1, 10 * operations) if engine.way.name == "substitution" else SLOW_BLOCK


def auto_threads(operations: int, batch: int, row_bytes: int) -> int:
    """CPU threads for computing, where others compress and write.

    Args:
        operations: floating-point operations of one sample's forward pass.
        batch: samples at once.
        row_bytes: bytes a sample leaves in the store.
    """
    cores = torch.get_num_threads()
    if operations * batch < SMALL_PASS:
        return 1
    return cores if operations > MOSTLY_COMPUTING * row_bytes else max(1, cores // 2)
