"""What a GPU is for, in one command of under eight minutes: `python tests/benchmarks/gpu.py [row …] > gpu.json`.

Collecting from the first sample read to the finalised store; samples a second by each method of overfitting; steps of training
each kind of denoiser, and the share of the card's peak that the paper's U-Net reaches; predicting with it. Where there is an
authors' way (one sample at a time) it is timed in the same run. `--small` is the same on little data, which a CPU does too.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from collect import ADAM, ALL, SGD, collected, loop_seconds
from common import chosen, entry, project, seconds, show
from infer import MEMBERS, inferred, inputs
from infer import loop_seconds as member_seconds
from train import accumulated, begun, changed, peak_flops, stepped

from stages.collect import Collect
from stages.lifecycle.context import RunContext
from stages.run_directory.project import Project
from stages.select_layer import select_layer
from stages.train_base import train_base
from stages.train_diffusion import train_diffusion
from stages.train_scale import train_scale
from stages.training.memory import training_bytes

# Layers by the method that overfits them, and with how many samples a method is timed.
METHODS = {
    "outer product": ("Mnist", "fc1.weight", ADAM, 60_000),
    "outer product, sgd, factored": ("Mnist", "fc1.weight", SGD, 60_000),
    "substitution": ("Mnist", "conv2.weight", ADAM, 20_000),
    "vmap": ("Functional", "weight", ADAM, 20_000),
    "loop": ("Branching", "weight", ADAM, 200),
}
# A U-Net like the paper's that a CPU gets through.
TINY = {"width": 8, "multipliers": [1, 2]}


@dataclass(frozen=True)
class Bench:
    """What the rows share: a run that has collected."""

    folder: Path
    device: str
    small: bool

    def count(self, samples: int) -> int:
        """So many samples, or few."""
        return min(100, samples) if self.small else samples

    def seconds(self, wanted: float) -> float:
        return 0.5 if self.small else wanted

    def prepared(self, task: str, layer: str, settings: dict[str, Any], samples: int) -> Project:
        """A project that only has to collect."""
        # The head's deltas are small.
        layer = "fc2.weight" if self.small and layer == "fc1.weight" else layer
        given = {**ALL, "select-layer.layer": layer, **settings, "collect.samples": self.count(samples)}
        found = project(self.folder / f"{task}-{layer}-{samples}-{settings['collect.optimizer']}", task, given, self.device)
        train_base(found)
        select_layer(found)
        return found

    @cached_property
    def finished(self) -> tuple[Project, Collect, float]:
        """60,000 deltas of 84×120, and how long they took, in seconds a sample."""
        found = self.prepared(*METHODS["outer product"])
        return (found, *collected(found))

    def denoiser(self, preset: str) -> Project:
        """The same, about to train a denoiser."""
        tiny = TINY if self.small and preset == "paper" else {}
        return changed(self.finished[0], preset=preset, **({"batch_size": 8, **tiny} if self.small else {}))


def collect_end_to_end(bench: Bench) -> dict[str, Any]:
    """Seconds to overfit 60,000 samples (LeNet5 fc1, three Adam steps) and have them on the disk; target 6."""
    _, stage, each = bench.finished
    manifest, count = stage.context.manifest_of("collect"), len(stage.rows)
    loop = loop_seconds(stage, 4 if bench.small else 200)
    more = {"method": manifest.summary["method"], **manifest.execution, "loop_ms_per_sample": round(1e3 * loop, 3)}
    more |= {"times_faster": round(loop / each, 1), "samples_per_second": round(1 / each)}
    return entry(count * each, 6, at_least=False, samples=count, **more)


def collect_methods(bench: Bench) -> dict[str, Any]:
    """Samples a second by method, written."""
    table = {}
    for name, given in METHODS.items():
        stage, each = bench.finished[1:] if name == "outer product" else collected(bench.prepared(*given))
        manifest = stage.context.manifest_of("collect")
        assert manifest.summary["method"] == name.partition(",")[0], (name, manifest.summary)
        table[name] = {"samples_per_second": round(1 / each, 1), "batch_size": manifest.execution["batch_size"]}
    return {"methods": table}


def _training(bench: Bench, preset: str, wanted: float) -> tuple[dict[str, Any], float, Any, Any]:
    """Figures of training a preset for a while, samples a second, and what took part."""
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    stage, training = begun(bench.denoiser(preset))
    training.trainer.advance()
    stage.context.wait()
    first = time.perf_counter() - start
    took, steps, waited = stepped(stage, training, bench.seconds(wanted))
    settings = stage.decided({})
    rate = steps * training.batches.batch_size / took
    figures = {
        "steps_per_second": round(steps / took, 2),
        "samples_per_second": round(rate, 1),
        "waiting_for_data": round(waited / took, 4),
        "batch_size": training.batches.batch_size,
        "micro_batch": training.steps.micro_batch,
        "seconds_to_the_first_step": round(first, 1),
        "parameters": settings.parameters,
        "planned_gib": round(training_bytes(settings.sketch, training.steps.micro_batch, settings.half) / 2**30, 2),
    }
    if bench.device == "cuda":
        figures["taken_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return figures, rate, stage, training


def train_paper(bench: Bench) -> dict[str, Any]:
    """The paper's U-Net: share of the measured bf16 peak of this device; target 0.45. Beside it a batch of one in float32."""
    figures, rate, stage, training = _training(bench, "paper", 12)
    # Forward and twice as much backward, two operations a multiplication.
    achieved = 6 * stage.decided({}).operations * rate
    best = peak_flops(bench.device, 512 if bench.small else 8192)
    # One sample at a time is the authors' way; the compiler would begin anew for it.
    training.denoiser.fuse(False)
    single = accumulated(stage, training, bench.seconds(5))
    figures |= {
        "tflops": round(achieved / 1e12, 1),
        "peak_tflops": round(best / 1e12, 1),
        "single_per_second": round(single, 2),
    }
    return entry(achieved / best, 0.45, at_least=True, **figures)


def train_dense(bench: Bench) -> dict[str, Any]:
    """The other denoisers' steps; the value is the largest share of time that one of them waits for data, target 0.1."""
    table = {preset: _training(bench, preset, 5)[0] for preset in ("mlp", "factored")}
    return entry(max(found["waiting_for_data"] for found in table.values()), 0.1, at_least=False, presets=table)


def infer_paper(bench: Bench) -> dict[str, Any]:
    """Milliseconds an input with five members of the paper's U-Net, ten steps each; against one sample and member at a time."""
    found = bench.denoiser("paper")
    quick = {"train_diffusion": {"max_steps": 1}, "train_scale": {"max_steps": 1}}
    tables = {name: getattr(found.settings, name).model_copy(update=values) for name, values in quick.items()}
    found = _with(found, tables)
    train_diffusion(found)
    train_scale(found)
    count = 2 if bench.small else 320
    stage, took = inferred(found, inputs(bench.folder, count))
    loop = member_seconds(RunContext(found), 1 if bench.small else 2) * MEMBERS
    more = {"inputs": count, "members": MEMBERS, "batch_size": stage.folder.manifest().execution["batch_size"]}
    more |= {"loop_ms": round(1e3 * loop, 2), "times_faster": round(loop * count / took, 1)}
    return {"ms_per_input": round(1e3 * took / count, 3), **more}


def _with(found: Project, tables: dict[str, Any]) -> Project:
    return found.__class__(**{**found.__dict__, "settings": found.settings.model_copy(update=tables)})


ROWS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "collect_end_to_end": collect_end_to_end,
    "collect_methods": collect_methods,
    "train_paper": train_paper,
    "train_dense": train_dense,
    "infer_paper": infer_paper,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help=f"some of {', '.join(ROWS)}; by default all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--small", action="store_true", help="little data and a small U-Net")
    given = parser.parse_args()
    if given.small:
        os.environ["OCD_BENCHMARK_SAMPLES"] = "512"
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), given.device, given.small)
        for name in chosen(ROWS, given.rows):
            took = seconds(lambda name=name: results.update({name: ROWS[name](bench)}))
            print(f"{name} ({took:.0f} s): {results[name]}", file=sys.stderr, flush=True)
    show(results, given.device)


if __name__ == "__main__":
    main()
