"""Layer selection (Eq. 6): the entropy of a sample's loss when only one layer is perturbed."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from stages.foundation.memory import AtOnce, on_its_way, one_behind
from stages.foundation.seeds import generator
from stages.foundation.trees import Tree, batch_size, repeat_batch
from stages.per_sample.layer import Layer
from stages.per_sample.weights import PerSampleWeights

# Below this bandwidth a loss counts as constant: its entropy is then that of a Gaussian of this width, about −17 nats.
SMALLEST_BANDWIDTH = 1e-8
BINS_PER_BANDWIDTH = 16
FEWEST_BINS, MOST_BINS = 1 << 10, 1 << 18


def silverman_bandwidth(values: np.ndarray) -> float:
    """Silverman's rule for one dimension, h = σ · (3n/4)^(−1/5), σ with n − 1 (Silverman, 1986).

    Args:
        values: (n,).
    """
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return max(spread * (0.75 * len(values)) ** -0.2, SMALLEST_BANDWIDTH)


def kde_entropy(values: np.ndarray) -> float:
    """Entropy in nats by a Gaussian kernel density, −1/n Σ log p̂(x_i), p̂(x) = 1/n Σ_j N(x; x_j, h²).

    Values are binned linearly on a grid of h/16 or finer and convolved by FFT, so that many draws cost n log n, not n²; where a
    far outlier would need over 262,144 bins they are coarser.

    Args:
        values: (n,), the draws of one sample's loss.
    """
    values = np.asarray(values, dtype=np.float64)
    # An entropy does not depend on where the values lie; beside large ones a small bandwidth would vanish in rounding.
    values = values - values.mean()
    bandwidth = silverman_bandwidth(values)
    low, high = values.min() - 5 * bandwidth, values.max() + 5 * bandwidth
    wanted = BINS_PER_BANDWIDTH * (high - low) / bandwidth
    bins = int(2 ** np.ceil(np.log2(np.clip(wanted, FEWEST_BINS, MOST_BINS))))
    step = (high - low) / (bins - 1)
    place = (values - low) / step
    left = np.clip(place.astype(np.int64), 0, bins - 2)
    right_share = place - left
    counts = np.bincount(left, 1 - right_share, bins) + np.bincount(left + 1, right_share, bins)
    offsets = step * np.minimum(np.arange(2 * bins), 2 * bins - np.arange(2 * bins))
    kernel = np.exp(-0.5 * (offsets / bandwidth) ** 2) / (bandwidth * np.sqrt(2 * np.pi))
    density = np.fft.irfft(np.fft.rfft(counts, 2 * bins) * np.fft.rfft(kernel), 2 * bins)[:bins] / len(values)
    at_values = (1 - right_share) * density[left] + right_share * density[left + 1]
    # A value's own kernel bounds its density from below; FFT rounding may dip under it far from all others.
    own = 1 / (len(values) * bandwidth * np.sqrt(2 * np.pi))
    return float(-np.log(np.maximum(at_values, own)).mean())


def perturbed_losses(
    run: PerSampleWeights,
    layer: Layer,
    weight: Tensor,
    x: Tree,
    y: Tree,
    loss: Callable[[Tree, Tree], Tensor],
    *,
    draws: int,
    sigma: float,
    seed: int,
    at_once: int,
) -> Iterator[np.ndarray]:
    """Losses L(f(x, θ^L), y) under draws of θ^L = θ + σ · std(θ) · noise, the same draws for all samples (Eq. 6).

    Args:
        run: the model with other weights for the layer.
        layer: the candidate L.
        weight: its weight θ.
        x, y: S samples.
        loss: (output, y) to (B,).
        draws: number of draws.
        sigma: noise in standard deviations of the weight's own entries.
        seed: the run's seed; draw j depends on it, the layer's name and j alone.
        at_once: draws in one forward pass; fewer where a GPU's memory does not do for them.

    Yields:
        (draws in this pass, S), float64.
    """
    samples, on_gpu = batch_size(x), weight.device.type == "cuda"
    scale = sigma * weight.std() if weight.numel() > 1 else torch.zeros_like(weight)

    def drawn(numbers: range) -> Callable[[], Tensor]:
        noise = _noise(layer, numbers, seed, on_gpu).to(weight.device, non_blocking=on_gpu)
        weights = weight + scale * noise.to(weight.dtype)
        with torch.no_grad():
            values = loss(run(repeat_batch(x, len(numbers)), weights), repeat_batch(y, len(numbers)))
        return on_its_way(values.reshape(len(numbers), samples).double(), weight.device)

    yield from (values.numpy() for values in one_behind(AtOnce(at_once).each(range(draws), drawn), weight.device))


def _noise(layer: Layer, numbers: range, seed: int, pinned: bool) -> Tensor:
    """Standard normal draws by number, (draws, *layer.shape), in single precision whatever torch's default is now; page-locked
    for a GPU."""
    made = torch.empty(len(numbers), *layer.shape, dtype=torch.float32, device="cpu", pin_memory=pinned)
    for row, j in zip(made, numbers, strict=True):
        row.normal_(generator=generator(seed, "select-layer", layer.name, j))
    return made


def rank_stability(entropies: np.ndarray, rng: np.random.Generator, resamples: int = 200) -> np.ndarray:
    """Share of bootstrap resamples of the samples in which each candidate keeps its rank.

    Args:
        entropies: (candidates, S), each sample's entropy.
        rng: source of the resamples.

    Returns:
        (candidates,), in [0, 1].
    """
    ranks = ranks_of(entropies.sum(1))
    kept = np.zeros(len(entropies))
    for _ in range(resamples):
        picked = rng.integers(0, entropies.shape[1], entropies.shape[1])
        kept += ranks_of(entropies[:, picked].sum(1)) == ranks
    return kept / resamples


def ranks_of(scores: np.ndarray) -> np.ndarray:
    """Rank of each score, 1 for the highest: (n,) to (n,) int."""
    order = np.argsort(-scores, kind="stable")
    ranks = np.empty(len(scores), dtype=np.int64)
    ranks[order] = np.arange(1, len(scores) + 1)
    return ranks
