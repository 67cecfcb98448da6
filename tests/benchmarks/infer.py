"""Inferring against one sample and one member at a time, both in one run: `python tests/benchmarks/infer.py [row …]`.

The loop is the authors' way: for each sample and member the base's forward pass with hooks, the encoder, ten sampler steps on a
batch of one, the delta added to a copied weight, a full forward pass. It writes nothing. The faster of one thread and of all
cores counts.
"""

import copy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import tasks
import torch
from common import entry, main, project, seconds

from stages.collect import collect
from stages.infer import Infer
from stages.lifecycle.context import RunContext
from stages.per_sample.capture import LAYER_INPUT, capture
from stages.per_sample.layer import find_layer
from stages.per_sample.runner import Runner
from stages.prediction.predictor import load_generator
from stages.run_directory.project import Project
from stages.select_layer import select_layer
from stages.tasks.conditioning import condition
from stages.train_base import train_base
from stages.train_diffusion import train_diffusion
from stages.train_scale import train_scale

MEMBERS, SAMPLES, LOOPED = 5, 1000, 6
# How well the networks are trained takes no time at inference.
SETTINGS = {
    "train-base.epochs": 1,
    "train-base.batch_size": 128,
    "select-layer.draws": 0,
    "select-layer.layer": "fc1.weight",
    "collect.samples": 256,
    "train-diffusion.preset": "mlp",
    "train-diffusion.max_steps": 1,
    "train-scale.max_steps": 1,
    "infer.ensemble": MEMBERS,
    "infer.sample_steps": 10,
}


def settled(folder: Path, device: str, settings: dict[str, Any] | None = None) -> Project:
    """A project on MNIST."""
    return project(folder, "FewDigits", SETTINGS | (settings or {}), device)


def finished(folder: Path, device: str) -> Project:
    """A project that only has to infer."""
    found = settled(folder, device)
    for stage in (train_base, select_layer, collect, train_diffusion, train_scale):
        stage(found)
    return found


def inputs(folder: Path, samples: int) -> Path:
    """A file of so many digits."""
    path = folder / f"digits-{samples}.npz"
    np.savez(path, x=tasks.Mnist().arrays()[0][:samples].numpy())
    return path


def inferred(found: Project, path: Path) -> tuple[Infer, float]:
    """Infer for a file; the stage and its seconds."""
    stage = Infer(RunContext(found), input_file=path)
    stage.context.splits  # noqa: B018 (the user's own data are loaded before)
    Infer(RunContext(found), input_file=path).check()  # whatever torch imports when it is first used
    return stage, seconds(lambda: stage.execute(force=True))


def loop_seconds(context: RunContext, samples: int) -> float:
    """The authors' loop, seconds for a sample and a member."""
    base, layer, generate = context.base, context.layer, load_generator(context)
    given = [context.splits["train"].inputs([i]).to(context.device) for i in range(samples)]

    @torch.no_grad()
    def run(count: int) -> None:
        for row, x in enumerate(given[:count]):
            for member in range(MEMBERS):
                fields = condition(context.task, base, layer, x)[1]
                seen = capture(base, layer, context.forward, x)[1][LAYER_INPUT]
                delta = generate(fields, [row], range(member, member + 1), seen=seen)[0].matrices()
                model = copy.deepcopy(base)
                weight = model.get_parameter(layer.name)
                weight += delta.view(weight.shape)
                context.forward(model, x)
        context.wait()

    threads, found = torch.get_num_threads(), []
    for count in {1, threads}:
        torch.set_num_threads(count)
        run(1)
        found += [seconds(lambda: run(samples)) / (samples * MEMBERS) for _ in range(2)]
    torch.set_num_threads(threads)
    return min(found)


def infer_vs_single(folder: Path, device: str) -> dict[str, Any]:
    """The loop's time over ours, from the first file read to the finished answer."""
    found = finished(folder, device)
    before = loop_seconds(RunContext(found), LOOPED)
    stage, ours = inferred(found, inputs(folder, SAMPLES))
    loop = min(before, loop_seconds(RunContext(found), LOOPED)) * SAMPLES * MEMBERS
    manifest = stage.folder.manifest()
    return entry(
        loop / ours,
        10,
        at_least=True,
        loop_seconds=round(loop, 2),
        seconds=round(ours, 2),
        batch_size=manifest.execution["batch_size"],
        threads=manifest.made.threads,
    )


def infer_overhead(folder: Path, device: str) -> dict[str, Any]:
    """The share of the time that is spent outside the denoiser."""
    found, path = finished(folder, device), inputs(folder, SAMPLES)
    spent, wait = [0.0], RunContext(found).wait

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            wait()
            start = time.perf_counter()
            result = method(*args)
            wait()
            spent[0] += time.perf_counter() - start
            return result

        return call

    denoiser = type(load_generator(RunContext(found)).denoiser)
    stage = Infer(RunContext(found), input_file=path)
    stage.context.splits  # noqa: B018 (the user's own data are loaded before)
    Infer(RunContext(found), input_file=path).check()
    with patch.object(denoiser, "forward", timed(denoiser.forward)), patch.object(denoiser, "encode", timed(denoiser.encode)):
        took = seconds(lambda: stage.execute(force=True))
    return entry(1 - spent[0] / took, 0.2, at_least=False, seconds=round(took, 2), in_denoiser=round(spent[0], 2))


def prefix_once(folder: Path, device: str) -> dict[str, Any]:
    """Members' deltas applied at the head of a ResNet-18: one full pass for each, over the base's pass and theirs."""
    context = RunContext(project(folder, "Pictures", {"train-base.epochs": 1, "train-base.batch_size": 128}, device))
    model = context.new_model().to(context.device).eval().requires_grad_(False)
    layer, x = find_layer(model, "fc.weight"), context.splits["all"].inputs(range(256)).to(context.device)
    runner = Runner(model, layer, context.forward, x[:4])
    deltas = 0.01 * torch.randn(len(x), MEMBERS, *layer.matrix_shape, device=context.device)
    weights = layer.weight(model) + deltas

    @torch.no_grad()
    def ours() -> torch.Tensor:
        found = runner.members_along(runner.first_pass(x), x, deltas)(1.0)
        context.wait()
        return found

    @torch.no_grad()
    def full(member: int = 0) -> torch.Tensor:
        found = runner.method(x, weights[:, member])
        context.wait()
        return found

    torch.testing.assert_close(ours(), torch.stack([full(member) for member in range(MEMBERS)]), rtol=1e-3, atol=1e-4)
    # Single passes are compared, which take about as long as ours: where others use the machine, the least of some short times
    # is smaller than that of long ones, and all full passes in one would seem slower than they are. The ratio is at most 5.
    threads, times = torch.get_num_threads(), []
    for count in {1, threads}:
        torch.set_num_threads(count)
        times += [(seconds(full), seconds(ours)) for _ in range(12)]
    torch.set_num_threads(threads)
    one, fast = (min(column) for column in zip(*times, strict=True))
    more = {"full_pass_ms": round(one * 1e3, 2), "ours_ms": round(fast * 1e3, 2)}
    return entry(MEMBERS * one / fast, 3, at_least=True, **more)


def infer_memory(folder: Path, device: str) -> dict[str, Any]:
    """Peak memory beyond the data set's own, 20,000 inputs over 2,000; each in a process of its own."""
    finished(folder, device)
    for samples in (2_000, 20_000):
        inputs(folder, samples)
    command = [sys.executable, __file__, "--peak", str(folder), "--device", device, "--samples"]
    peaks = [float(subprocess.check_output([*command, str(samples)], text=True)) for samples in (2_000, 20_000)]
    return entry(peaks[1] / peaks[0], 1.1, at_least=False, peak_mib=[round(peak / 2**20, 1) for peak in peaks])


def peak(folder: Path, samples: int, device: str) -> None:
    """Print the peak memory of one answer beyond its data."""
    # One step of the sampler takes as much memory as ten.
    found = settled(folder, device, {"infer.sample_steps": 1})
    stage = Infer(RunContext(found), input_file=folder / f"digits-{samples}.npz")
    data = stage.context.splits["all"].dataset
    # The peak from here on, not that of loading the data.
    Path("/proc/self/clear_refs").write_text("5")
    stage.execute(force=True)
    own = sum(part.nbytes for part in (data.x, data.y)) + stage.inputs.dataset.x.nbytes
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    print(int(line.split()[1]) * 1024 - own)


ROWS: dict[str, Callable[[Path, str], dict[str, Any]]] = {
    "infer_vs_single": infer_vs_single,
    "infer_overhead": infer_overhead,
    "prefix_once": prefix_once,
    "infer_memory": infer_memory,
}


if __name__ == "__main__":
    main(__doc__, ROWS, peak=peak)
