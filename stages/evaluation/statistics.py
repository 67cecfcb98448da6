"""Figures over samples, each a function of how much every sample counts, so that a bootstrap only changes the weights."""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

# Resamples at once, and samples times resamples.
RESAMPLES_AT_ONCE, WEIGHTS_AT_ONCE = 64, 1 << 22
# Outside a 95 % interval, on each side.
TAIL = 0.025
# Steps of an integral over an angle, and how many standard deviations of a Gaussian it goes beyond.
ANGLES, DEVIATIONS = 100_001, 12
# Percentiles of resamples lie between the smallest and the largest of N samples, which have the median between them with a
# probability of 1 − 2^(1 − N): less than 0.95 below six.
FEWEST_SAMPLES = 6


class Statistic(ABC):
    """A figure over N samples."""

    @abstractmethod
    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """Its value where sample i counts `weights[r, i]`: (R, N), each row with sum 1, to (R,); NaN where it has none."""

    def standard_error(self, draws: np.ndarray) -> float:
        """Of the value over all samples; `draws` are bootstrap values, (R,): their standard deviation."""
        finite = draws[np.isfinite(draws)]
        return float(finite.std(ddof=1)) if len(finite) > 1 else float("nan")


@dataclass(frozen=True)
class Mean(Statistic):
    """Σ w_i v_i, of values (N,)."""

    values: np.ndarray

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        return weights @ self.values

    def standard_error(self, draws: np.ndarray) -> float:
        """s / sqrt(N), s with N − 1."""
        count = len(self.values)
        return float(self.values.std(ddof=1) / np.sqrt(count)) if count > 1 else float("nan")


@dataclass(frozen=True)
class RootMean(Statistic):
    """sqrt(Σ w_i v_i), of values (N,), none negative."""

    values: np.ndarray

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        return np.sqrt(weights @ self.values)


@dataclass(frozen=True)
class CalibrationError(Statistic):
    """Expected calibration error, Σ_b |Σ_{i in b} w_i (confidence_i − correct_i)|, equal bins (Guo et al., 2017, Eq. 3).

    Attributes:
        gaps: confidence minus correctness in the sample's bin, 0 in all others, (N, bins).
    """

    gaps: np.ndarray

    @classmethod
    def of(cls, confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> "CalibrationError":
        """From the confidence and correctness of each prediction: (N, P), P predictions a sample."""
        gaps = np.zeros((len(confidence), bins))
        place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
        rows = np.broadcast_to(np.arange(len(confidence))[:, None], place.shape)
        np.add.at(gaps, (rows, place), (confidence - correct) / confidence.shape[1])
        return cls(gaps)

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        return np.abs(weights @ self.gaps).sum(1)


@dataclass(frozen=True)
class Auroc(Statistic):
    """Probability that a positive sample's score is above a negative one's, ties counting half; (N,) both, `positive` bool."""

    scores: np.ndarray
    positive: np.ndarray

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        order = np.argsort(self.scores, kind="stable")
        _, group = np.unique(self.scores[order], return_inverse=True)
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        mine = weights[:, order] * self.positive[order]
        others = weights[:, order] - mine
        mine, others = np.add.reduceat(mine, starts, axis=1), np.add.reduceat(others, starts, axis=1)
        below = np.cumsum(others, axis=1) - others / 2
        pairs = mine.sum(1) * others.sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(pairs > 0, (mine * below).sum(1) / pairs, np.nan)


def resample_weights(samples: int, resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each sample counts in bootstrap resamples, some at a time: (r, N), each row with sum 1."""
    at_once = max(1, min(RESAMPLES_AT_ONCE, WEIGHTS_AT_ONCE // samples))
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        picked = rng.integers(0, samples, (count, samples)) + samples * np.arange(count)[:, None]
        yield np.bincount(picked.ravel(), minlength=count * samples).reshape(count, samples) / samples


@dataclass(frozen=True)
class Estimate:
    """A figure over all samples, and over each bootstrap resample.

    Attributes:
        draws: (R,); draw r of every figure is of the same resample, so that differences of draws are paired.
        samples: N.
        values: of each sample, (N,), where the figure is their mean.
    """

    value: float
    standard_error: float
    draws: np.ndarray
    samples: int
    values: np.ndarray | None = None

    def minus(self, other: "Estimate", tail: float = TAIL) -> tuple[float, tuple[float, float]]:
        """The paired difference, and its interval: Student's for means, else of the resamples; NaN of fewer than six samples.

        `tail` is left out on each side.
        """
        difference = self.value - other.value
        if self.values is None or other.values is None or self.samples < FEWEST_SAMPLES:
            return difference, interval_of(self.draws - other.draws, self.samples, tail)
        interval = interval_of_mean(self.values - other.values, tail)
        return difference, interval if math.isfinite(interval[0]) else (math.nan, math.nan)


def interval_of(draws: np.ndarray, samples: int, tail: float = TAIL) -> tuple[float, float]:
    """The interval of a figure of N samples: percentiles of the finite draws, (R,); NaN where there is none, or N < 6.

    Where samples are few, resamples vary less than samples would. So the percentiles are Φ(∓ sqrt(N / (N − 1)) t), t of
    Student's distribution, which are 2.5 and 97.5 for many samples (the expanded percentile interval of Hesterberg, 2015).
    """
    finite = draws[np.isfinite(draws)]
    if not len(finite) or samples < FEWEST_SAMPLES:
        return float("nan"), float("nan")
    outside = NormalDist().cdf(-((samples / (samples - 1)) ** 0.5) * student(samples - 1, tail))
    return tuple(map(float, np.quantile(finite, (outside, 1 - outside))))


def interval_of_mean(values: np.ndarray, tail: float = TAIL) -> tuple[float, float]:
    """Student's interval of the mean of samples, (n,); from −∞ to ∞ where one is not finite, or n is 1."""
    if len(values) < 2 or not np.isfinite(values).all():
        return -math.inf, math.inf
    mean, error = float(values.mean()), student(len(values) - 1, tail) * float(values.std(ddof=1)) / len(values) ** 0.5
    return mean - error, mean + error


@functools.cache
def student(degrees: int, tail: float = TAIL) -> float:
    """The quantile of Student's t distribution that leaves `tail` above it.

    t = sqrt(degrees) tan θ turns its density into cos(θ)^(degrees − 1), which is summed from 0 on (trapezoids).
    """
    angles = np.linspace(0, min(math.pi / 2, DEVIATIONS / degrees**0.5), ANGLES)
    density = np.cos(angles).clip(0) ** (degrees - 1)
    within = np.append(0, np.cumsum(density[1:] + density[:-1]))
    return float(degrees**0.5 * np.tan(np.interp((1 - 2 * tail) * within[-1], within, angles)))


def estimates(
    statistics: Mapping[Any, Statistic],
    samples: int,
    resamples: int,
    rng: np.random.Generator,
    on_progress: Callable[[int], None] = lambda done: None,
) -> dict[Any, Estimate]:
    """Every figure over all samples and over the same bootstrap resamples, by its key."""
    whole = np.full((1, samples), 1 / samples)
    parts: dict[Any, list[np.ndarray]] = {key: [] for key in statistics}
    done = 0
    for weights in resample_weights(samples, resamples, rng):
        for key, statistic in statistics.items():
            parts[key].append(statistic(weights))
        done += len(weights)
        on_progress(done)
    found = {}
    for key, statistic in statistics.items():
        draws = np.concatenate(parts[key])
        # The sum of N times 1/N is 1 but for rounding; a perfect accuracy is 1.
        value = float(f"{float(statistic(whole)[0]):.14g}")
        values = statistic.values if isinstance(statistic, Mean) else None
        found[key] = Estimate(value, statistic.standard_error(draws), draws, samples, values)
    return found


def minimum(function: Callable[[float], float], low: float, high: float, steps: int = 60) -> float:
    """Where a function of one minimum between `low` and `high` has it (golden-section search)."""
    ratio = (5**0.5 - 1) / 2
    inner = [high - ratio * (high - low), low + ratio * (high - low)]
    values = [function(place) for place in inner]
    for _ in range(steps):
        if values[0] < values[1]:
            high, inner[1], values[1] = inner[1], inner[0], values[0]
            inner[0] = high - ratio * (high - low)
            values[0] = function(inner[0])
        else:
            low, inner[0], values[0] = inner[0], inner[1], values[1]
            inner[1] = low + ratio * (high - low)
            values[1] = function(inner[1])
    return (low + high) / 2
