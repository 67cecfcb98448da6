"""The verdict: does OCD's ensemble help, and is the gain its own?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.evaluation import rows as row
from stages.evaluation.statistics import Estimate
from stages.tasks.scoring import finite

# What a gain has to be a gain over, beside the base.
RIVALS = (row.TEMPERATURE, row.RANDOM_TRAINING, row.SHUFFLED)
NEIGHBOURS = (row.NEAREST, row.NEAREST_INPUT, row.BLENDED, row.BLENDED_INPUT)


@dataclass(frozen=True)
class Comparison:
    """The loss of OCD's ensemble minus that of another row, over all samples, and its paired 95 % interval."""

    difference: float
    interval: tuple[float, float]

    @property
    def favours(self) -> bool:
        """Whether the whole interval is on the ensemble's side."""
        return self.interval[1] < 0

    @property
    def against(self) -> bool:
        """Whether the whole interval is on the other row's side."""
        return self.interval[0] > 0


def compared_with(estimates: Mapping[str, Estimate]) -> dict[str, Comparison]:
    """OCD's ensemble against every row that the verdict speaks of, by name; `estimates` are of the loss."""
    return {
        name: Comparison(*estimates[row.ENSEMBLE].minus(estimates[name]))
        for name in (row.BASE, *RIVALS, *NEIGHBOURS, *_further(estimates))
        if name in estimates and row.ENSEMBLE in estimates
    }


def verdict(
    comparisons: Mapping[str, Comparison], estimates: Mapping[str, Estimate], metric: str, *, classes: bool = True
) -> str:
    """One sentence: OCD `helps`, `does not help` or `harms`, with the figures it is said from.

    It helps only if the paired interval of the loss favours the ensemble over each of base, temperature-scaled base, random
    training deltas and shuffled conditioning. The best of the neighbours and the best of the task's own
    rows are named beside it, whoever wins. A task without classes has no temperature to scale by; `metric` is what the loss is
    called, and `estimates` are of it.
    """
    needed = [name for name in RIVALS if classes or name != row.TEMPERATURE]
    base, rivals = comparisons[row.BASE], [name for name in needed if name in comparisons]
    absent = [name for name in needed if name not in comparisons]
    equals = [name for name in rivals if not comparisons[name].favours]
    figures = f"{metric} {estimates[row.BASE].value:.4f} → {estimates[row.ENSEMBLE].value:.4f}"
    if base.against:
        said = f"OCD harms: {figures}, {_interval(base)}"
    elif not base.favours:
        said = f"OCD does not help: {figures}, {_interval(base)}, is no difference"
    elif equals:
        # The one that comes closest to OCD's own loss explains the most of it.
        name = min(equals, key=lambda other: estimates[other].value)
        does_as_well = estimates[name].value <= estimates[row.ENSEMBLE].value
        gains = does_as_well or Comparison(*estimates[name].minus(estimates[row.BASE])).favours
        why = f"the gain is that of {name}" if gains else f"too few samples to tell it from {name}"
        said = f"OCD does not help: {why} ({estimates[name].value:.4f}); {figures}, {_interval(base)}"
    elif absent:
        why = f"there is no {_listed(absent)} to compare with"
        said = f"OCD does not help beyond doubt: {why}; {figures}, {_interval(base)}"
    else:
        said = f"OCD helps: {figures}, {_interval(base)}; {_listed(rivals)} do less"
    return said + "".join(_beside(names, comparisons, estimates) for names in (NEIGHBOURS, _further(estimates)))


def _further(estimates: Mapping[str, Estimate]) -> list[str]:
    """The task's own rows."""
    return [name for name in estimates if name not in row.TABLE]


def _interval(comparison: Comparison) -> str:
    low, high = comparison.interval
    return f"{comparison.difference:+.4f} with a 95 % interval of [{low:+.4f}, {high:+.4f}]"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _beside(names: Sequence[str], comparisons: Mapping[str, Comparison], estimates: Mapping[str, Estimate]) -> str:
    known = [name for name in names if name in comparisons]
    if not known:
        return ""
    name = min(known, key=lambda other: estimates[other].value)
    comparison = comparisons[name]
    how = "is better" if comparison.against else "is worse" if comparison.favours else "does as well"
    return f"; the {name} {how} ({estimates[name].value:.4f})"


def as_json(comparisons: Mapping[str, Comparison]) -> dict[str, Any]:
    return {
        name: {"difference": finite(c.difference), "interval": [*map(finite, c.interval)]} for name, c in comparisons.items()
    }
