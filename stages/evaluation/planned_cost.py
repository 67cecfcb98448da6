"""What a full run would take, from the task, one layer and a few steps."""

import time
from typing import Any

import torch

from stages.diffusion.denoisers import auto_preset, make_denoiser, resolve
from stages.evaluation.subject import Batch
from stages.lifecycle.context import RunContext
from stages.per_sample.layer import Layer
from stages.run_directory.pipeline import AUTO
from stages.store.delta_store import result_specs
from stages.training.memory import operations

# Chunks compress to about two thirds at best; what is said is what they take uncompressed. Steps of more multiplications are
# too slow to try.
FLOAT_BYTES, MOST_OPERATIONS = 4, 1 << 36


def cost_of_run(context: RunContext, few: Batch, each: float) -> dict[str, Any]:
    """Seconds of collecting and (at most) of training the denoiser, and bytes of the store.

    Args:
        few: at least one sample, with the layer.
        each: seconds that overfitting a sample takes.
    """
    settings, layer = context.project.settings, few.subject.layer
    samples = len(context.splits[settings.collect.split])
    if settings.collect.samples != "all":
        samples = min(samples, settings.collect.samples)
    fields = {name: value[0].numel() for name, value in few.fields.items()}
    factors = settings.collect.store != "dense" and few.subject.overfitter.one_product
    specs = result_specs(layer.matrix_shape, factored=factors)
    row_bytes = sum(spec.row_bytes for spec in specs.values()) + FLOAT_BYTES * sum(fields.values())
    step = _training_step(context, layer, fields, factors)
    return {
        "samples": samples,
        "collect_seconds": each * samples,
        "collect_bytes": samples * row_bytes,
        "train_diffusion_seconds": None if step is None else step * settings.train_diffusion.max_steps,
    }


def _training_step(context: RunContext, layer: Layer, fields: dict[str, int], factors: bool) -> float | None:
    """Seconds of one step of the denoiser's training; None where it is too large to try."""
    table = context.project.settings.train_diffusion
    auto = {"preset": auto_preset(layer.matrix_shape, factors=factors)} if table.preset == AUTO else {}
    description = resolve(table.model_dump() | auto, layer.matrix_shape)
    description |= {"shape": layer.matrix_shape, "fields": fields}
    with torch.device("meta"):
        if operations(make_denoiser(description)) * description["batch_size"] > MOST_OPERATIONS:
            return None
    try:
        return _timed_step(context, description)
    except torch.OutOfMemoryError:
        return None


def _timed_step(context: RunContext, description: dict[str, Any]) -> float:
    """Of the second step, in seconds."""
    device, batch = context.device, description["batch_size"]
    denoiser = make_denoiser(description).to(device)
    shape = denoiser.shape
    given = {name: torch.zeros(batch, count, device=device) for name, count in description["fields"].items()}
    noisy, t = torch.zeros(batch, *shape, device=device), torch.zeros(batch, dtype=torch.long, device=device)
    for _ in range(2):
        start = time.perf_counter()
        denoiser(noisy, t, denoiser.encode(given)).square().mean().backward()
        context.wait()
    return time.perf_counter() - start
