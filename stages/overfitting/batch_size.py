"""How many samples to overfit at once, and on how many threads: from the cache, the memory and the size of the work."""

import torch

from stages.foundation.trees import Tree, batch_size, leaves
from stages.overfitting.overfitter import Overfitter
from stages.per_sample.pass_size import CACHE_BYTES, activation_bytes, largest_output, recorded_bytes
from stages.per_sample.weights import Loop

SMALLEST, LARGEST = 32, 512
LARGEST_ON_GPU = 4096
# As many blocks as there may be in memory.
MOST_TOGETHER, INPUT_BYTES = 10, 64 << 20
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


def sample_bytes(overfitter: Overfitter, x: Tree, of_step: Tree, *, factored: bool) -> int:
    """Memory that one sample takes while it is overfitted: its weight with gradient, moments and a temporary (less in closed
    form, none where factors are all there is), what the backward pass keeps, the prefix's record and the largest outputs.

    Args:
        overfitter: overfits it.
        x: a few inputs.
        of_step: what a gradient step uses of them.
        factored: whether deltas are kept as factors.
    """
    copies = 5 if overfitter.why_dense else 0 if factored else 2
    recorded = recorded_bytes(overfitter.first_pass(x).record, x)
    model, layer, forward = overfitter.model, overfitter.layer, overfitter.forward
    kept = activation_bytes(model, layer, forward, of_step)
    return max(1, 4 * copies * layer.numel + 2 * kept + recorded + 2 * largest_output(model, forward, x))


def auto_batch_size(
    overfitter: Overfitter, sample: int, rows: int, available: int | None, device: torch.device, blocks: int = 1
) -> int:
    """Samples at once, so that equal batches fill a block of `rows`, or on a GPU several blocks: small batches keep it waiting.

    Args:
        overfitter: how they are overfitted; the loop takes one at a time.
        sample: bytes of one, as `sample_bytes`.
        rows: samples to a block.
        available: bytes of memory that are free, None where that is not known.
        device: where.
        blocks: that may be overfitted in one batch, as `blocks_together`.
    """
    if isinstance(overfitter.method, Loop):
        return 1
    if device.type == "cuda":
        wanted = min(LARGEST_ON_GPU, int(MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]) // sample)
        if wanted > rows:
            return min(wanted // rows, blocks) * rows
    else:
        wanted = min(LARGEST, max(SMALLEST, CACHE_BYTES // sample))
        if available is not None:
            wanted = min(wanted, max(min(LEAST, LEAST_BYTES // sample), int(MEMORY_SHARE * available) // sample))
    wanted = max(1, min(rows, wanted))
    return -(-rows // -(-rows // wanted))


def blocks_together(blocks: int, rows: int, x: Tree) -> int:
    """Blocks that a GPU may overfit in one batch: few, because a kill costs all of them, and not so many that their inputs fill
    the host's memory, of which several batches are read ahead.

    Args:
        blocks: of the store.
        rows: samples to a block.
        x: a few inputs.
    """
    sample = sum(leaf.nbytes for leaf in leaves(x).values()) // batch_size(x)
    return max(1, min(blocks, MOST_TOGETHER, INPUT_BYTES // max(1, rows * sample)))


def rows_worth_keeping(overfitter: Overfitter, operations: int) -> int:
    """Samples that take about half a minute on one core: what a kill may cost, which is the work of a block.

    Args:
        overfitter: how they are overfitted; the slow ways do a few hundred samples in that time.
        operations: floating-point operations of one sample's forward pass, of which there are about ten.
    """
    return BLOCK_OPERATIONS // max(1, 10 * operations) if overfitter.method.name == "substitution" else SLOW_BLOCK


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
