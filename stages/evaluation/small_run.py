"""A whole run on a few hundred samples: whether OCD tuned by the task's own loss gains, before a full run is paid for."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.evaluation.statistics import interval_of_mean
from stages.evaluation.subject import EvaluatedSamples
from stages.foundation.config import OBJECTIVES
from stages.foundation.errors import SettingsError
from stages.foundation.progress import Silent
from stages.foundation.trees import to_device
from stages.lifecycle.branches import branch_of, bring_up
from stages.lifecycle.context import RunContext
from stages.prediction.predictor import load_personalised
from stages.run_directory.pipeline import LEARNED
from stages.tasks.loader import losses
from stages.tasks.scoring import finite

SAMPLES, STEPS, ON_DELTAS, TUNED = 600, 300, 100, 64
LONGEST_S = 60.0
# Outside a 99 % interval, on each side: either way may be recommended.
TAIL = 0.005
WITHOUT, WITH = "without neighbours", "with neighbours"
WAYS = {WITHOUT: 0, WITH: OBJECTIVES["task"]["neighbours"]}
# What a way has beside the objective.
OWN_SETTINGS = {WITHOUT: {"train-diffusion.neighbours": 0}, WITH: {}}


def small_run(
    context: RunContext, start: Mapping[str, Any], evaluated: EvaluatedSamples, cost: Mapping[str, Any]
) -> dict[str, Any]:
    """Train both ways in a folder of their own, which is gone afterwards, and predict for held-out samples.

    Args:
        start: the layer and the settings of `[collect]`, by dotted name.
        cost: of a full run with them, as `cost_of_run` has it.

    Returns:
        {"samples", "steps", "base": its mean loss, "ways": {name: {"mean", "difference", "interval" (99 %), "gains"}},
        "settings": of `[train-diffusion]`, of the way whose gain is the surest; {} where none gains}.

    Raises:
        OcdError: it takes too long, or the run cannot be made; with the reason.
    """
    table = context.project.settings.train_diffusion
    noise = {"train-diffusion.conditioning_noise": table.conditioning_noise or OBJECTIVES["task"]["conditioning_noise"]}
    _require_quick(cost, table.max_steps)
    ways, base, surest, settings = {}, np.empty(0), 0.0, {}
    with tempfile.TemporaryDirectory(prefix="ocd-probe-") as folder:
        for name, count in WAYS.items():
            branch = branch_of(context.project, name, {**start, **_short(count), **noise}, Path(folder))
            bring_up(context.project, branch, LEARNED, Silent())
            base, own = losses_beside_base(RunContext(branch), evaluated)
            low, high = interval_of_mean(own - base, TAIL)
            ways[name] = {
                "mean": finite(float(own.mean())),
                "difference": finite(float((own - base).mean())),
                "interval": None if np.isinf(low) else [low, high],
                "gains": high < 0,
            }
            if high < surest:
                surest, settings = high, {"train-diffusion.objective": "task"} | OWN_SETTINGS[name] | noise
    samples = min(SAMPLES, len(context.splits["train"]))
    return {"samples": samples, "steps": STEPS, "base": finite(float(base.mean())), "ways": ways, "settings": settings}


def _require_quick(cost: Mapping[str, Any], full: int) -> None:
    """Both ways overfit the samples and pass the tuned ones through the model; `full` steps of a denoiser are in `cost`.

    Raises:
        SettingsError: they would take long.
    """
    if (denoiser := cost["train_diffusion_seconds"]) is None:
        raise SettingsError("the denoiser is too large to try", "see what a full run gives")
    each, tuned = cost["collect_seconds"] / cost["samples"], (STEPS - ON_DELTAS) * TUNED
    if (seconds := 2 * (each * (SAMPLES + tuned) + STEPS * denoiser / full)) > LONGEST_S:
        raise SettingsError(f"it would take about {seconds:,.0f} s", "see what a full run gives")


def _short(neighbours: int) -> dict[str, Any]:
    """Evaluated once, at the end: no held-out sample chooses weights."""
    short = {"max_steps": STEPS, "evaluate_steps": STEPS, "patience": 0}
    tuned = {"neighbours": neighbours, "tune_after": ON_DELTAS, "tune_samples": TUNED}
    return {
        "select-layer.draws": 0,
        "collect.samples": SAMPLES,
        "collect.split": "train",
        **{f"train-scale.{key}": value for key, value in short.items()},
        **{f"train-diffusion.{key}": value for key, value in {**short, **tuned}.items()},
    }


@torch.no_grad()
def losses_beside_base(context: RunContext, evaluated: EvaluatedSamples) -> tuple[np.ndarray, np.ndarray]:
    """The task's losses of the base and of OCD's ensemble at strength 1, sample by sample, (n,) each."""
    model, base, own = load_personalised(context, strength=1.0)[0], [], []
    for part in evaluated.order.split(TUNED):
        x, y = evaluated.split.batch(part)
        found = model.predict(x, rows=part.tolist())
        labels = to_device(y, model.device)
        for into, output in ((base, found.base_output), (own, found.output)):
            into.append(losses(context.task, output, labels).double().cpu().numpy())
    return np.concatenate(base), np.concatenate(own)
