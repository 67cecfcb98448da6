"""Training the denoiser, both sides of a ratio in one run: `python tests/benchmarks/train.py [row …]`.

On a CPU the `mlp` preset on the deltas of MNIST's LeNet5 (fc1, 84×120), stepped as `ocd train-diffusion` steps it; the authors'
way is a batch of one, its gradients accumulated over eight. On a GPU the `paper` preset, too: its throughput, the share of the
measured peak of matrix products, and sampling, one by one and in batches.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import entry, main, project

from stages.collect import collect
from stages.diffusion.denoisers import UNETS
from stages.diffusion.denoising import denoising_errors, held_out_figures, step_draws
from stages.diffusion.generate import DeltaGenerator
from stages.diffusion.scale import ScaleNetwork
from stages.diffusion.schedule import make_schedule
from stages.lifecycle.context import RunContext
from stages.run_directory.project import Project
from stages.select_layer import select_layer
from stages.train_base import train_base
from stages.train_diffusion import TrainDiffusion
from stages.training.denoiser_training import Training
from stages.training.memory import training_bytes

QUICK = {"train-base.epochs": 1, "train-base.batch_size": 128, "select-layer.draws": 0, "select-layer.layer": "fc1.weight"}
ACCUMULATED = 8
SAMPLES = 60_000
PRESET_SECONDS = 45


def collected(folder: Path, samples: int, device: str, **settings: Any) -> Project:
    """A project about to train its denoiser."""
    recipe = {"collect.split": "all", "collect.samples": samples, "collect.optimizer": "sgd", "collect.lr": 5e-3}
    found = project(folder, "Mnist", {**QUICK, **recipe, **settings}, device)
    for stage in (train_base, select_layer, collect):
        stage(found)
    return found


def begun(found: Project) -> tuple[TrainDiffusion, Training]:
    """What takes part in the training, on as many threads as the command would take."""
    stage = TrainDiffusion(RunContext(found))
    settings = stage.decided({})
    torch.set_num_threads(stage.auto_threads())
    return stage, stage.training(settings, stage.micro_batch(settings))


def stepped(stage: TrainDiffusion, training: Training, seconds: float, warm: int = 5) -> tuple[float, int, float]:
    """Train for a while after some steps: seconds, steps, and seconds of waiting for data."""
    for _ in range(warm):
        training.trainer.advance()
    stage.context.wait()
    before, waited, start = training.trainer.step, training.steps.waited_seconds, time.perf_counter()
    while time.perf_counter() - start < seconds:
        training.trainer.advance()
    stage.context.wait()
    took = time.perf_counter() - start
    return took, training.trainer.step - before, training.steps.waited_seconds - waited


def mlp_pass(folder: Path, device: str) -> dict[str, Any]:
    """Passes over 60,000 deltas a minute, and where the time goes."""
    stage, training = begun(collected(folder, SAMPLES, device, **{"train-diffusion.preset": "mlp"}))
    runs = [stepped(stage, training, 15) for _ in range(3)]
    rates = [steps * training.batches.batch_size / took for took, steps, _ in runs]
    return entry(
        max(rates) * 60 / SAMPLES,
        2,
        at_least=True,
        all_runs=[round(rate * 60 / SAMPLES, 3) for rate in rates],
        samples_per_second=round(max(rates), 1),
        batch_size=training.batches.batch_size,
        threads=torch.get_num_threads(),
        **limits(stage, training),
    )


def limits(stage: TrainDiffusion, training: Training) -> dict[str, Any]:
    """What a step spends its time on: the network's passes, the optimizer with clipping and average, waiting for data."""
    trainer, steps = training.trainer, training.steps
    passes = total = 0.0
    waited = steps.waited_seconds
    for _ in range(20):
        start = time.perf_counter()
        gradients = trainer._gradients

        def timed(gradients=gradients) -> float:
            nonlocal passes
            begin = time.perf_counter()
            loss = gradients()
            stage.context.wait()
            passes += time.perf_counter() - begin
            return loss

        trainer._gradients = timed
        trainer.advance()
        stage.context.wait()
        del trainer._gradients
        total += time.perf_counter() - start
    waited = steps.waited_seconds - waited
    shares = {"passes": (passes - waited) / total, "optimizer_and_average": (total - passes) / total, "data": waited / total}
    return {"shares": {name: round(value, 4) for name, value in shares.items()}, "limited_by": max(shares, key=shares.get)}


def accumulated(stage: TrainDiffusion, training: Training, seconds: float) -> float:
    """Samples a second, one by one, a step after every eight: the authors' way."""
    trainer, device = training.trainer, stage.context.device
    batches, taken = training.batches.batches(0), 0
    rows = next(batches).to(device)
    shape, schedule = tuple(rows.deltas.shape[1:]), stage.decided({}).schedule
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        trainer.optimizer.zero_grad(set_to_none=True)
        for _ in range(ACCUMULATED):
            t, noise = step_draws(1, shape, schedule.steps, 0, "single", taken)
            one = rows.take(slice(taken % len(rows), taken % len(rows) + 1))
            error = denoising_errors(trainer.network, schedule, one, t.to(device), noise.to(device)).mean()
            (error / ACCUMULATED).backward()
            taken += 1
        torch.nn.utils.clip_grad_norm_(trainer.network.parameters(), 1.0)
        trainer.optimizer.step()
        trainer._average()
    stage.context.wait()
    return taken / (time.perf_counter() - start)


def mlp_vs_batch1(folder: Path, device: str) -> dict[str, Any]:
    """Samples a second in the default batch over one by one; the faster of one thread and all counts for the latter."""
    stage, training = begun(collected(folder, 4096, device, **{"train-diffusion.preset": "mlp"}))
    threads, single = torch.get_num_threads(), []
    for count in sorted({1, len(os.sched_getaffinity(0))}):
        torch.set_num_threads(count)
        single.append(accumulated(stage, training, 6))
    torch.set_num_threads(threads)
    took, steps, _ = stepped(stage, training, 10)
    rate = steps * training.batches.batch_size / took
    figures = {"ours_per_second": round(rate, 1), "single_per_second": round(max(single), 2), "accumulated": ACCUMULATED}
    return entry(rate / max(single), 8, at_least=True, **figures)


def data_wait(folder: Path, device: str) -> dict[str, Any]:
    """Share of a step spent waiting for data, the larger of: the store in memory, the store read from the disk meanwhile."""
    found = collected(folder, 20_000, device, **{"train-diffusion.preset": "mlp"})
    shares = {}
    for name, memory in (("memory", "auto"), ("disk", 0.0)):
        stage, training = begun(changed(found, store_memory=memory))
        took, _, waited = stepped(stage, training, 15)
        shares[name] = round(waited / took, 4)
    return entry(max(shares.values()), 0.03, at_least=False, **shares)


def presets(folder: Path, device: str) -> dict[str, Any]:
    """Each preset trained for the same time from the same store: time a sample, memory as planned, and, where that time is
    enough to learn anything in, the held-out loss. The value is the factored preset's held-out loss over the MLP's."""
    found, table = collected(folder, SAMPLES, device), {}
    for name in ("mlp", "factored", "small", "paper", "authors"):
        # A U-Net's step of 128 takes minutes on a CPU.
        slow = device == "cpu" and name in UNETS
        stage, training = begun(changed(found, preset=name, **({"batch_size": 8} if slow else {})))
        took, steps, _ = stepped(stage, training, PRESET_SECONDS, warm=1 if slow else 5)
        settings = stage.decided({})
        table[name] = {
            "parameters": settings.parameters,
            "ms_per_sample": round(1e3 * took / (steps * training.batches.batch_size), 3),
            "batch_size": training.batches.batch_size,
            "steps": training.trainer.step,
            "planned_mib": round(training_bytes(settings.sketch, training.steps.micro_batch, settings.half) / 2**20),
        }
        if not slow:
            held_out = training.batches.held_out.to(stage.context.device)
            figures = held_out_figures(training.trainer.averaged, settings.schedule, held_out, 0, training.steps.micro_batch)
            table[name] |= {"held_out_loss": round(figures["score"], 4), "cosine": round(figures["cosine"], 4)}
        print(f"  {name}: {table[name]}", file=sys.stderr, flush=True)
        del stage, training
    value = table["factored"]["held_out_loss"] / table["mlp"]["held_out_loss"]
    return entry(value, 1, at_least=False, seconds=PRESET_SECONDS, threads=torch.get_num_threads(), presets=table)


def changed(found: Project, **settings: Any) -> Project:
    """The project with other settings of the training."""
    table = found.settings.train_diffusion.model_copy(update=settings)
    return replace(found, settings=found.settings.model_copy(update={"train_diffusion": table}))


def paper_training(folder: Path, device: str) -> dict[str, Any]:
    """On a GPU: the `paper` preset's samples a second over a batch of one in float32, and its share of the measured peak."""
    stage, training = begun(collected(folder, 8192, device, **{"train-diffusion.preset": "paper"}))
    settings = stage.decided({})
    took, steps, waited = stepped(stage, training, 30)
    rate = steps * training.batches.batch_size / took
    # Forward and twice as much backward, two operations a multiplication.
    achieved, best = 6 * settings.operations * rate, peak_flops(device)
    figures = {"samples_per_second": round(rate, 1), "tflops": round(achieved / 1e12, 1), "peak_tflops": round(best / 1e12, 1)}
    figures |= {"micro_batch": training.steps.micro_batch, "waiting": round(waited / took, 4)}
    figures["single_per_second"] = round(accumulated(stage, training, 15), 2)
    return entry(achieved / best, 0.4, at_least=True, **figures)


def peak_flops(device: str, size: int = 8192) -> float:
    """Operations a second of a large product in bfloat16, measured."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(5):
        a @ b
    wait()
    start = time.perf_counter()
    for _ in range(30):
        a @ b
    wait()
    return 30 * 2 * size**3 / (time.perf_counter() - start)


def paper_sampling(folder: Path, device: str) -> dict[str, Any]:
    """On a GPU: latency of one sample with ten steps, and members a second in batches over one by one."""
    stage, training = begun(collected(folder, 2048, device, **{"train-diffusion.preset": "paper"}))
    denoiser = training.denoiser.eval().requires_grad_(False)
    fields = training.batches.held_out.to(stage.context.device).fields
    widths = {name: value[0].numel() for name, value in fields.items()}
    generate = DeltaGenerator(
        denoiser,
        make_schedule("ddpm", 84 * 120, denoiser.prediction),
        ScaleNetwork(widths, 128).to(stage.context.device),
        seed=0,
        sampler="ddim",
        sample_steps=10,
        strength=1.0,
    )

    def members_per_second(samples: int, members: int, repeats: int) -> float:
        given = {name: value[:samples] for name, value in fields.items()}
        generate(given, list(range(samples)), range(members))
        stage.context.wait()
        start = time.perf_counter()
        for _ in range(repeats):
            generate(given, list(range(samples)), range(members))
        stage.context.wait()
        return repeats * samples * members / (time.perf_counter() - start)

    single, batched = members_per_second(1, 1, 20), members_per_second(64, 5, 4)
    figures = {"latency_ms": round(1e3 / single, 2), "members_per_second": round(batched, 1)}
    return entry(batched / single, 10, at_least=True, **figures)


ROWS = {"mlp_pass": mlp_pass, "mlp_vs_batch1": mlp_vs_batch1, "data_wait": data_wait, "presets": presets}
ON_GPU = {"paper_training": paper_training, "paper_sampling": paper_sampling}


if __name__ == "__main__":
    main(__doc__, ROWS, on_gpu=ON_GPU)
