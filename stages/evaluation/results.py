"""`results.json`: every row with mean, standard error and the paired difference to the base."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from stages.evaluation.fitting import OnValidation
from stages.evaluation.metrics import LOSS, Gathered
from stages.evaluation.rows import BASE
from stages.evaluation.statistics import Estimate, estimates
from stages.tasks.scoring import finite

Estimates = dict[str, dict[str, Estimate]]


def primary_metric(base: Gathered) -> str:
    """The name of the loss: that of a metric which is the loss, or `loss`."""
    loss = base.values(LOSS)
    others = (name for name, parts in base.parts.items() if name != LOSS and not name.endswith("*"))
    return next((name for name in others if np.array_equal(base.values(name), loss)), LOSS)


def estimate_all(
    gathered: Mapping[str, Gathered], resamples: int, rng: np.random.Generator, on_progress: Callable[[int], None]
) -> tuple[Estimates, str]:
    """Every metric of every row, all over the same resamples, and the name of the loss among them."""
    primary = primary_metric(gathered[BASE])
    statistics = {
        (row, name): statistic
        for row, contributions in gathered.items()
        for name, statistic in contributions.statistics().items()
        if name != LOSS or primary == LOSS
    }
    samples = len(gathered[BASE].values(LOSS))
    found: Estimates = {row: {} for row in gathered}
    for (row, name), estimate in estimates(statistics, samples, resamples, rng, on_progress).items():
        found[row][name] = estimate
    return found, primary


def row_records(
    gathered: Mapping[str, Gathered],
    found: Estimates,
    on_validation: OnValidation | None = None,
    strengths: Mapping[str, float] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """The rows of `results.json`; a metric without a value is null, with the reason."""
    known = on_validation or OnValidation(1.0)
    return [
        {
            "name": row,
            "members": gathered[row].members,
            "strength": strengths.get(row),
            "validated": row in known.fitted,
            "validation_loss": _finite(known.loss_of(row, strengths)),
            "metrics": _metrics(found, row, gathered[row].missing),
        }
        for row in found
    ]


def _finite(value: float | None) -> float | None:
    return None if value is None else finite(value)


def _metrics(found: Estimates, row: str, missing: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    records = {}
    for name, estimate in found[row].items():
        base = found[BASE].get(name)
        difference, interval = estimate.minus(base) if base is not None else (math.nan, (math.nan, math.nan))
        records[name] = {
            "mean": finite(estimate.value),
            "standard_error": finite(estimate.standard_error),
            "difference": finite(difference),
            "interval": None if math.isnan(interval[0]) else list(interval),
        }
    empty = {"mean": None, "standard_error": None, "difference": None, "interval": None}
    return records | {name: {**empty, "reason": reason} for name, reason in missing.items()}


def over_seeds(results: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean ± standard deviation over whole trainings of every row that all of them have; `results` by seed.

    Returns:
        {"seeds", "verdicts", "rows": [{"name", "metrics": {name: {"mean", "standard_deviation", "values"}}}]}.
    """
    by_name = [{row["name"]: row["metrics"] for row in result["rows"]} for result in results.values()]
    rows = []
    for name in by_name[0]:
        if all(name in other for other in by_name):
            metrics = {metric: _spread([other[name].get(metric) for other in by_name]) for metric in by_name[0][name]}
            rows.append({"name": name, "metrics": {metric: entry for metric, entry in metrics.items() if entry is not None}})
    return {"seeds": list(results), "verdicts": [result["verdict"] for result in results.values()], "rows": rows}


def _spread(entries: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    values = [entry["mean"] for entry in entries if entry is not None and entry["mean"] is not None]
    if len(values) < len(entries):
        return None
    return {"mean": float(np.mean(values)), "standard_deviation": float(np.std(values, ddof=1)), "values": values}
