"""Four ways to train a denoiser, by the loss of its ensemble on validation samples: on deltas alone, as the paper does,
or tuned by the task's own loss; each without neighbours and with them.

`python tests/benchmarks/objectives.py PROJECT --seeds 3 [--set table.key=value …]` copies a project whose base may be trained,
and trains the base, the layer's deltas and every way for each seed. What `--set` says holds for all ways. The tuned ways have
chosen their weights by the same samples, so that small differences from the others mean nothing.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import seconds, show

from stages.collect import collect
from stages.evaluation.small_run import losses_beside_base
from stages.evaluation.subject import EvaluatedSamples
from stages.lifecycle.context import RunContext
from stages.run_directory.project import load_project
from stages.select_layer import select_layer
from stages.train_base import train_base
from stages.train_diffusion import train_diffusion
from stages.train_scale import train_scale

NEIGHBOURS = {"train-diffusion.neighbours": 5}
TUNED = {"train-diffusion.tune_after": "auto"}
WAYS: dict[str, dict[str, Any]] = {
    "paper": {"train-diffusion.tune_after": 0, "train-diffusion.neighbours": 0},
    "paper, neighbours": {"train-diffusion.tune_after": 0, **NEIGHBOURS},
    "tuned": {**TUNED, "train-diffusion.neighbours": 0},
    "tuned, neighbours": {**TUNED, **NEIGHBOURS},
}


def validation_losses(context: RunContext) -> tuple[float, float]:
    """The mean loss on validation samples of the base, and of the ensemble."""
    split = context.splits["validation"]
    base, own = losses_beside_base(context, EvaluatedSamples(split, torch.arange(len(split))))
    return float(base.mean()), float(own.mean())


def compared(folder: Path, seed: int, given: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of one seed: each way's loss, in units of the base's, and the seconds that its trainings took."""
    found = {}
    for name, way in WAYS.items():
        settings = {"run.directory": f"run-{seed}", "run.seed": seed, **way}
        project = load_project(folder / "ocd.toml", overrides=given, values=settings)
        for stage in (train_base, select_layer, collect):
            stage(project)
        took = seconds(lambda project=project: [stage(project, force=True) for stage in (train_scale, train_diffusion)])
        base, own = validation_losses(RunContext(project))
        found[name] = {"loss": own, "base": base, "of_base": own / base, "seconds": round(took, 1)}
        print(f"seed {seed}, {name}: {found[name]}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("project", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--set", action="append", default=[])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / given.project.resolve().name
        shutil.copytree(given.project, folder, ignore=shutil.ignore_patterns("run", "run-*", "__pycache__", ".venv"))
        seeds = [compared(folder, seed, given.set) for seed in range(given.seeds)]
    ways = {}
    for name in WAYS:
        ratios = [found[name]["of_base"] for found in seeds]
        spread = {"standard_deviation": round(statistics.stdev(ratios), 4)} if len(ratios) > 1 else {}
        ways[name] = {"of_base": round(statistics.mean(ratios), 4), **spread, "seeds": [found[name] for found in seeds]}
    show(ways, "cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
