"""The verdict: does OCD's ensemble help, and is the gain its own?"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.evaluation import rows as row
from stages.evaluation.statistics import Estimate
from stages.foundation.numbers import ROUNDING, figure, signed
from stages.tasks.scoring import finite

HELPS, DOES_NOT, HARMS, UNDECIDED = "helps", "does not help", "harms", "undecided"
# What a gain has to be a gain over, beside the base: without the first there is no verdict, the others count where they are.
NEEDED = (row.TEMPERATURE, row.RANDOM_TRAINING, row.SHUFFLED)
RIVALS = (*NEEDED, row.MEAN_DELTA, row.LONGER)
NEIGHBOURS = (row.NEAREST, row.NEAREST_INPUT, row.BLENDED, row.BLENDED_INPUT)
# The share of the base's loss below which a gain is none worth the trouble: to leave no room for more is to have no gain.
SMALLEST_GAIN = 0.01
# What changes no weight of the base.
OTHERWISE = (row.PLAIN, row.NEAREST_LABELS, row.DEEP)
# Any one of up to six comparisons can end in a word that is wrong: each interval leaves out 1 %, half of it on either side.
VERDICT_TAIL, COVERED = 0.005, "99 %"
# More samples than that nobody has.
MOST_SAMPLES = 10**7


@dataclass(frozen=True)
class Comparison:
    """The loss of OCD's ensemble minus that of another row, over all samples, and its paired 99 % interval."""

    difference: float
    interval: tuple[float, float]

    @property
    def has_interval(self) -> bool:
        """Not of a handful of samples, nor of losses that are not finite."""
        return not math.isnan(self.interval[0])

    @property
    def favours(self) -> bool:
        """Whether the whole interval is on the ensemble's side."""
        return self.interval[1] < 0

    @property
    def against(self) -> bool:
        """Whether the whole interval is on the other row's side."""
        return self.interval[0] > 0

    def leaves_no_gain(self, smallest: float) -> bool:
        """Whether the interval leaves no room for a gain of `smallest`."""
        return not self.favours and self.interval[0] >= -smallest

    def times_too_wide(self, smallest: float) -> tuple[float, float]:
        """By how many times the interval is too wide to favour the ensemble, and to leave no gain, where the difference stays;
        infinite where no narrower one would, or there is none."""
        (low, high), middle = self.interval, self.difference
        if not self.has_interval:
            return math.inf, math.inf
        favours = (high - middle) / -middle if middle < 0 else math.inf
        return favours, (middle - low) / (middle + smallest) if middle > -smallest else math.inf


def samples_to_decide(open_ones: Sequence[Comparison], samples: int, smallest: float) -> int | None:
    """How many samples would make every interval favour the ensemble, or one of them leave no gain, if the differences stay as
    they are and intervals shrink with 1/sqrt(N); None where no number would."""
    favours, no_gain = zip(*(comparison.times_too_wide(smallest) for comparison in open_ones), strict=True)
    wanted = samples * min(max(favours), *no_gain) ** 2
    return math.ceil(wanted) if wanted <= MOST_SAMPLES else None


@dataclass(frozen=True)
class Verdict:
    """What is said of OCD.

    Attributes:
        outcome: one of `helps`, `does not help`, `harms`, `undecided`.
        sentence: one sentence that contains the outcome, and no other one, with the figures it is said from.
        rival: the row that has the gain, or that OCD cannot be told from; None where that is nothing but the base.
        samples: about how many test samples would decide it; None where it is decided, or no number would.
        absent: the rows that there are none of to compare with, where nothing else is in doubt.
        rival_gains: whether the rival is better than the base beyond doubt.
    """

    outcome: str
    sentence: str
    rival: str | None = None
    samples: int | None = None
    absent: tuple[str, ...] = ()
    rival_gains: bool = False


def compared_with(estimates: Mapping[str, Estimate]) -> dict[str, Comparison]:
    """OCD's ensemble against every row that the verdict speaks of, by name; `estimates` are of the loss."""
    names = (row.BASE, *RIVALS, *NEIGHBOURS, *OTHERWISE, *_further(estimates))
    if row.ENSEMBLE not in estimates:
        return {}
    return {name: _comparison(estimates[row.ENSEMBLE], estimates[name]) for name in names if name in estimates}


def _comparison(ours: Estimate, other: Estimate) -> Comparison:
    """The paired difference of two rows; what is rounding of their losses is none."""
    difference, interval = ours.minus(other, VERDICT_TAIL)
    smallest = ROUNDING * abs(other.value)
    low, high, difference = (0.0 if abs(value) < smallest else value for value in (*interval, difference))
    return Comparison(difference, (low, high))


def verdict(
    comparisons: Mapping[str, Comparison], estimates: Mapping[str, Estimate], metric: str, *, classes: bool = True
) -> Verdict:
    """Whether OCD helps, from the paired 99 % intervals of the loss of its ensemble against base and rivals: temperature-scaled
    base, random training deltas, shuffled conditioning, and, where they are there, mean delta and the base trained for as long
    again.

    - `harms`: the interval against the base is on the base's side.
    - `does not help`: against the base or a rival no gain of 1 % of the base's loss is possible, or a rival has the gain.
    - `helps`: the interval favours the ensemble against the base and each rival.
    - `undecided`: anything else, for want of samples or of a rival to compare with.

    Beside it stand the best of the neighbours' deltas, of what changes no weight of the base, and of the task's own rows,
    where they are better than the base, and what OCD has at its validated strength, where that is better than the ensemble. A
    task without classes has no temperature to scale by; `metric` is what the loss is called, and `estimates` are of it.
    """
    needed = [name for name in NEEDED if classes or name != row.TEMPERATURE]
    asked = [name for name in RIVALS if name in comparisons and (classes or name != row.TEMPERATURE)]
    values = figure(estimates[row.BASE].value), figure(estimates[row.ENSEMBLE].value)
    figures = f"{metric} {' → '.join(values)}, {_interval(comparisons[row.BASE])}"
    found = _decided(comparisons, estimates, asked, [name for name in needed if name not in comparisons], figures)
    beside = "".join(_beside(names, comparisons, estimates) for names in (NEIGHBOURS, OTHERWISE, _further(estimates)))
    validated = estimates.get(row.VALIDATED)
    better = validated and _comparison(validated, estimates[row.ENSEMBLE]).favours
    if better and _comparison(validated, estimates[row.BASE]).difference < 0:
        beside += f"; at its validated strength OCD has {figure(validated.value)}"
    return dataclasses.replace(found, sentence=found.sentence + beside)


def _decided(
    comparisons: Mapping[str, Comparison],
    estimates: Mapping[str, Estimate],
    asked: Sequence[str],
    absent: list[str],
    figures: str,
) -> Verdict:
    """The verdict without what stands beside it."""
    base, smallest = comparisons[row.BASE], SMALLEST_GAIN * abs(estimates[row.BASE].value)
    if base.against:
        return Verdict(HARMS, f"OCD {HARMS}: {figures}")
    if base.leaves_no_gain(smallest):
        return Verdict(DOES_NOT, f"OCD {DOES_NOT}: {figures}, leaves no room for a gain of {100 * SMALLEST_GAIN:g} %")
    taken = [name for name in asked if _has_the_gain(name, comparisons, estimates, smallest)]
    if taken:
        # The one that comes closest to OCD's own loss explains the most of it.
        name = min(taken, key=lambda other: estimates[other].value)
        theirs = f"{name} ({figure(estimates[name].value)})"
        why = f"{theirs} gains more" if comparisons[name].against else f"the gain is that of {theirs}"
        why = why if base.favours else f"it does no better than {theirs}"
        gains = _comparison(estimates[name], estimates[row.BASE]).favours
        return Verdict(DOES_NOT, f"OCD {DOES_NOT}: {why}; {figures}", name, rival_gains=gains)
    open_ones = [name for name in (row.BASE, *asked) if not comparisons[name].favours]
    if open_ones:
        return _undecided(comparisons, estimates, open_ones, smallest, figures)
    if absent:
        return Verdict(UNDECIDED, f"{UNDECIDED}: there is no {_listed(absent)} to compare with; {figures}", absent=(*absent,))
    not_tried = "" if row.LONGER in comparisons else "; a longer training of the base was not tried"
    return Verdict(HELPS, f"OCD {HELPS}: {figures}; {_listed(list(asked))} do less{not_tried}")


def _has_the_gain(name: str, comparisons: Mapping[str, Comparison], estimates: Mapping[str, Estimate], smallest: float) -> bool:
    """Whether a rival is better than the ensemble, or as good: no gain over it is possible, or its own over the base is beyond
    doubt and, as far as one can see, no smaller."""
    comparison, rival = comparisons[name], estimates[name]
    if comparison.against or comparison.leaves_no_gain(smallest):
        return True
    gains = _comparison(rival, estimates[row.BASE]).favours
    return not comparison.favours and gains and rival.value <= estimates[row.ENSEMBLE].value


def _undecided(
    comparisons: Mapping[str, Comparison],
    estimates: Mapping[str, Estimate],
    open_ones: Sequence[str],
    smallest: float,
    figures: str,
) -> Verdict:
    """Too few samples to tell the ensemble from the base and the rivals that are open."""
    samples = estimates[row.BASE].samples
    needed = samples_to_decide([comparisons[name] for name in open_ones], samples, smallest)
    name = row.BASE if row.BASE in open_ones else min(open_ones, key=lambda other: estimates[other].value)
    # The rows that this number of samples tells it from: the hardest one to favour it against, or one without a gain.
    widths = {other: comparisons[other].times_too_wide(smallest) for other in (name, *open_ones)}
    hardest = max(widths, key=lambda other: widths[other][0])
    without = min(widths, key=lambda other: widths[other][1])
    told = [name]
    if needed:
        told = dict.fromkeys((name, hardest)) if widths[hardest][0] <= widths[without][1] else [without]
    than = _listed(["the base" if other == row.BASE else f"{other} ({figure(estimates[other].value)})" for other in told])
    how_many = f", about {rounded(needed):,} would" if needed else ""
    if needed is None and all(comparisons[other].has_interval for other in open_ones):
        how_many = f", more than {MOST_SAMPLES:,} would"
    tell = "sample does" if samples == 1 else "samples do"
    said = f"{UNDECIDED}: {samples:,} test {tell} not tell the ensemble from {than}{how_many}; {figures}"
    return Verdict(UNDECIDED, said, None if name == row.BASE else name, needed)


def rounded(count: int) -> int:
    """A number of two digits and zeros, no smaller."""
    unit = 10 ** max(0, len(str(count)) - 2)
    return -(-count // unit) * unit


def _further(estimates: Mapping[str, Estimate]) -> list[str]:
    """The task's own rows."""
    return [name for name in estimates if name not in row.TABLE]


def _interval(comparison: Comparison) -> str:
    low, high = comparison.interval
    if not comparison.has_interval:
        return f"{signed(comparison.difference)} without an interval"
    return f"{signed(comparison.difference)} with a {COVERED} interval of [{signed(low)}, {signed(high)}]"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _beside(names: Sequence[str], comparisons: Mapping[str, Comparison], estimates: Mapping[str, Estimate]) -> str:
    known = [name for name in names if name in comparisons and _comparison(estimates[name], estimates[row.BASE]).difference < 0]
    if not known:
        return ""
    name = min(known, key=lambda other: estimates[other].value)
    comparison = comparisons[name]
    how = "is better than" if comparison.against else "is worse than" if comparison.favours else "cannot be told from"
    return f"; {name} ({figure(estimates[name].value)}) {how} the ensemble"


def as_json(comparisons: Mapping[str, Comparison]) -> dict[str, Any]:
    return {
        name: {"difference": finite(c.difference), "interval": [*map(finite, c.interval)]} for name, c in comparisons.items()
    }
