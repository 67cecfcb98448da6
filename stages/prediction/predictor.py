"""From a finished run to a model with input-dependent weights."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stages.diffusion.denoisers import VECTOR
from stages.diffusion.generate import DeltaGenerator
from stages.diffusion.scale import ScaleNetwork
from stages.diffusion.schedule import make_schedule
from stages.diffusion.unet import UNetDenoiser
from stages.foundation.errors import ArtifactError
from stages.foundation.memory import AtOnce, free_on_gpu
from stages.foundation.tensors import load_tensors
from stages.foundation.trees import Tree, concatenate, leaves, to_device, tree_map
from stages.lifecycle.context import RunContext
from stages.per_sample.runner import FirstPass, Runner
from stages.per_sample.self_check import equal
from stages.prediction.personalised import PersonalisedModel
from stages.run_directory.descriptions import DenoiserDescription, ScaleDescription, Strength
from stages.run_directory.pipeline import AUTO
from stages.run_directory.project import Project
from stages.tasks.conditioning import fields_of
from stages.tasks.data import as_float32, check_like
from stages.tasks.user_code import user_code
from stages.training.bank import BANK_FILE, Bank
from stages.training.encoders import build_denoiser, build_scale
from stages.training.memory import activation_bytes
from stages.training.retrieval import Retrieval

STRENGTH_FILE = "strength.json"
# Memory that the denoiser's activations may take: on a CPU more at once is no faster; on a GPU a share of what is free, since
# batches lie beside it, and the estimate is of a training's pass, which keeps more.
DENOISING_BYTES, DENOISING_SHARE = 2 << 30, 0.6
# How far the predictions of a few inputs may be changed by half precision, of their size.
HALF_TOLERANCE, HALF_ROWS = 1e-3, 4


def load_personalised(context: RunContext, strength: float | None = None) -> tuple[PersonalisedModel, str]:
    """The base with input-dependent weights, as `[infer]` asks (`strength` in place of its own), and by which slower way it has
    to run ("" if it does not).

    Raises:
        ArtifactError: networks that are missing, damaged, or of another layer.
    """
    task, base, layer, device = context.task, context.base_to_overfit(), context.layer, context.device
    sample = context.splits["all"].inputs([0])
    runner = Runner(base, layer, context.forward, to_device(concatenate([sample, sample]), device), watched=task.watched)
    kind = type(layer.module(base))

    retrieval = load_retrieval(context, runner)

    def conditioned(x: Tree, first: FirstPass) -> dict[str, Tensor]:
        fields = fields_of(task, kind, x, first.output, first.captured)[0]
        return fields if retrieval is None else retrieval(x, first, fields)

    def prepared(x: Tree) -> Tree:
        x = tree_map(as_float32, x)
        check_like(x, sample, "x")
        # Page-locked inputs are copied while the host goes on.
        return tree_map(lambda leaf: leaf.to(device, non_blocking=device.type == "cuda"), x)

    def combined(outputs: Tree) -> Tree:
        with user_code("combine()"):
            return task.combine(outputs)

    ensemble = context.project.settings.infer.ensemble
    personalised = PersonalisedModel(runner, conditioned, load_generator(context, strength), combined, prepared, ensemble)
    few = context.splits["all"].inputs(range(min(HALF_ROWS, len(context.splits["all"]))))
    personalised.generate = in_half(personalised.generate, lambda one: personalised.with_deltas_of(one).predict(few, 1).members)
    return personalised, f"deltas are applied by {runner.method.name}: {runner.reason}" if runner.reason else ""


def strength_of(context: RunContext) -> float:
    """The strength `[infer]` asks for; `auto` is the one that `evaluate` fitted.

    Raises:
        ArtifactError: nothing has been fitted.
    """
    if (strength := context.project.settings.infer.strength) != AUTO:
        return strength
    found = Strength.read(context.file_of("evaluate", STRENGTH_FILE)).strength
    if found is None:
        raise ArtifactError(
            "infer.strength = 'auto': evaluate fitted no strength, for want of validation samples that neither base nor "
            "denoiser has learned from",
            "name one with --strength NUMBER, or give validation samples with task.validation",
        )
    return found


def load_generator(context: RunContext, strength: float | None = None) -> DeltaGenerator:
    """The trained denoiser and scale network, as `[infer]` samples from them; `strength` in place of its own.

    Raises:
        ArtifactError: one is missing, damaged, or of another layer.
    """
    project, device = context.project, context.device
    description = DenoiserDescription.read(context.file_of("train-diffusion", "denoiser.json"))
    denoiser = build_denoiser(project, description)
    rows = _denoised_at_once(project, description, device)
    _load(denoiser, context.file_of("train-diffusion", "denoiser.safetensors"))
    if tuple(description.shape) != context.layer.matrix_shape:
        raise ArtifactError(
            f"the denoiser makes deltas of {tuple(description.shape)}, the layer is {context.layer.matrix_shape}",
            "run: ocd train-diffusion --force",
        )
    settings = project.settings.infer
    is_picture = isinstance(denoiser, UNetDenoiser) and device.type == "cuda"
    denoiser = denoiser.to(device, memory_format=torch.channels_last) if is_picture else denoiser.to(device)
    return DeltaGenerator(
        denoiser.eval().requires_grad_(False),
        make_schedule(description.schedule, math.prod(denoiser.shape), description.prediction),
        load_scale(context),
        project.seed,
        settings.sampler,
        settings.sample_steps,
        strength_of(context) if strength is None else strength,
        AtOnce(rows, tell=lambda left: context.report.message(f"memory ran out: from here on {left} deltas at once")),
        vectors=description.preset == VECTOR,
    )


def load_retrieval(context: RunContext, runner: Runner) -> Retrieval | None:
    """What adds to the conditioning what is said of neighbours; None where the denoiser knows of none.

    Raises:
        ArtifactError: the bank is missing or damaged.
    """
    known = DenoiserDescription.read(context.file_of("train-diffusion", "denoiser.json")).neighbours
    if known is None:
        return None
    bank = Bank.read(context.file_of("train-diffusion", BANK_FILE))
    return Retrieval(context.task, runner, bank.to(context.device), known)


def load_scale(context: RunContext) -> ScaleNetwork:
    """The trained scale network.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    description = ScaleDescription.read(context.file_of("train-scale", "scale.json"))
    scale = build_scale(description)
    _load(scale, context.file_of("train-scale", "scale.safetensors"))
    return scale.to(context.device).eval().requires_grad_(False)


def in_half(generate: DeltaGenerator, outputs: Callable[[DeltaGenerator], Tree]) -> DeltaGenerator:
    """A generator whose U-Net computes in bfloat16 on a GPU, many times as fast there, unless that shows in the `outputs` of a
    few inputs; others as they are."""
    if generate.device.type != "cuda" or not isinstance(generate.denoiser, UNetDenoiser):
        return generate
    half = dataclasses.replace(generate, half=True)
    wanted, found = (tuple(leaf.float() for leaf in leaves(outputs(one)).values()) for one in (generate, half))
    return half if equal(found, wanted, HALF_TOLERANCE) else generate


def _denoised_at_once(project: Project, description: DenoiserDescription, device: torch.device) -> int:
    """Members that the denoiser is given at once."""
    with torch.device("meta"):
        each = activation_bytes(build_denoiser(project, description))
    room = int(DENOISING_SHARE * free_on_gpu(device)) if device.type == "cuda" else DENOISING_BYTES
    return room // max(1, each)


def _load(network: nn.Module, path: Any) -> None:
    try:
        network.load_state_dict(load_tensors(path))
    except RuntimeError as error:
        raise ArtifactError(
            f"{path} does not fit its description: {str(error).splitlines()[0]}", "redo that stage with --force"
        ) from error
