"""A whole run on a few hundred samples: whether OCD tuned by the task's own loss gains, before a full run is paid for."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.evaluation.statistics import interval_of_mean
from stages.evaluation.subject import EvaluatedSamples
from stages.foundation.errors import SettingsError
from stages.foundation.progress import Silent
from stages.foundation.trees import to_device
from stages.lifecycle.branches import branch_of, bring_up
from stages.lifecycle.context import RunContext
from stages.prediction.predictor import load_personalised
from stages.run_directory.pipeline import LEARNED
from stages.tasks.loader import losses

SAMPLES, STEPS, ON_DELTAS, TUNED = 600, 300, 100, 64
LONGEST_S = 60.0
# Outside a 99 % interval, on each side: either way may be recommended.
TAIL = 0.005
WAYS = {"without neighbours": 0, "with neighbours": 5}


def small_run(context: RunContext, start: Mapping[str, Any], evaluated: EvaluatedSamples, each: float) -> dict[str, Any]:
    """Train both ways in a folder of their own, which is gone afterwards, and predict for held-out samples.

    Args:
        start: the layer and the settings of `[collect]`, by dotted name.
        each: seconds that overfitting a sample takes.

    Returns:
        {"samples", "steps", "base": its mean loss, "ways": {name: {"mean", "difference", "interval" (99 %), "gains"}}}.

    Raises:
        OcdError: it takes too long, or the run cannot be made; with the reason.
    """
    steps = (STEPS - ON_DELTAS) * TUNED
    if (seconds := 2 * each * (SAMPLES + steps)) > LONGEST_S:
        raise SettingsError(f"it would take about {seconds:,.0f} s", "see what a full run gives")
    ways, base = {}, np.empty(0)
    with tempfile.TemporaryDirectory(prefix="ocd-probe-") as folder:
        for name, count in WAYS.items():
            branch = branch_of(context.project, name, _settings(start, count), Path(folder))
            bring_up(context.project, branch, LEARNED, Silent())
            base, own = _losses(RunContext(branch), evaluated)
            low, high = interval_of_mean(own - base, TAIL)
            found = {"mean": float(own.mean()), "difference": float((own - base).mean()), "interval": [low, high]}
            ways[name] = found | {"gains": high < 0}
    return {"samples": min(SAMPLES, len(context.splits["train"])), "steps": STEPS, "base": float(base.mean()), "ways": ways}


def _settings(start: Mapping[str, Any], neighbours: int) -> dict[str, Any]:
    """Short, and evaluated once, at the end: no held-out sample chooses weights."""
    short = {"max_steps": STEPS, "evaluate_steps": STEPS, "patience": 0}
    tuned = {"neighbours": neighbours, "tune_after": ON_DELTAS, "tune_samples": TUNED, "conditioning_noise": 0.3}
    return {
        **start,
        "select-layer.draws": 0,
        "collect.samples": SAMPLES,
        "collect.split": "train",
        **{f"train-scale.{key}": value for key, value in short.items()},
        **{f"train-diffusion.{key}": value for key, value in {**short, **tuned}.items()},
    }


@torch.no_grad()
def _losses(context: RunContext, evaluated: EvaluatedSamples) -> tuple[np.ndarray, np.ndarray]:
    """Of the base and of OCD, sample by sample, (n,) each."""
    model, base, own = load_personalised(context)[0], [], []
    for part in evaluated.order.split(TUNED):
        x, y = evaluated.split.batch(part)
        found = model.predict(x, rows=part.tolist())
        labels = to_device(y, model.device)
        for into, output in ((base, found.base_output), (own, found.output)):
            into.append(losses(context.task, output, labels).double().cpu().numpy())
    return np.concatenate(base), np.concatenate(own)
