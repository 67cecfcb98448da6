"""How many samples to predict at once."""

import torch

from stages.foundation.trees import Tree
from stages.per_sample.pass_size import CACHE_BYTES, largest_output, recorded_bytes
from stages.per_sample.runner import Runner

LARGEST_PREDICTED = 1024
# Deltas of a batch, all members of it: the sampler goes over them several times a step, which wants them in the cache; the
# denoiser's products want many.
PREDICTED_BYTES, PREDICTED_ON_GPU = 10 << 20, 256 << 20


def prediction_bytes(runner: Runner, x: Tree) -> int:
    """Memory that a sample of x takes while its members are predicted, without its deltas: the prefix's record, and the largest
    outputs."""
    return recorded_bytes(runner.first_pass(x).record, x) + 2 * largest_output(runner.model, runner.forward, x)


def prediction_batch(sample: int, numel: int, members: int, device: torch.device) -> int:
    """Samples (of so many bytes, as `prediction_bytes`) to predict at once, with all members of each; `numel` is a delta's."""
    deltas = (PREDICTED_ON_GPU if device.type == "cuda" else PREDICTED_BYTES) // (4 * numel * members)
    most = max(1, min(LARGEST_PREDICTED, deltas, CACHE_BYTES // sample if sample else LARGEST_PREDICTED))
    # Parts of it are chunks of sampled deltas.
    return most // 16 * 16 if most >= 16 else 1 << (most.bit_length() - 1)
