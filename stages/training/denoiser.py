"""Which denoiser a run trains, and whether it fits memory."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from stages.diffusion.denoiser import Denoiser
from stages.diffusion.denoisers import UNETS, VECTOR, auto_preset, denoised_shape, resolve
from stages.diffusion.neighbour_encoder import NEIGHBOURS
from stages.diffusion.schedule import NoiseSchedule, make_schedule
from stages.foundation.config import TrainDiffusionTable
from stages.foundation.errors import SettingsError, TryAgainError
from stages.foundation.files import available_memory
from stages.foundation.memory import free_on_gpu
from stages.foundation.processes import local_count
from stages.run_directory.descriptions import DenoiserDescription, EncoderDescription
from stages.run_directory.format import StoreDescription
from stages.run_directory.pipeline import AUTO
from stages.run_directory.project import Project
from stages.store.delta_store import DELTA
from stages.store.reader import field_widths
from stages.training.encoders import build_denoiser, described_encoders
from stages.training.memory import operations, parameters, training_bytes

STAGE = "train-diffusion"
FLOAT32, BFLOAT16 = "float32", "bfloat16"
# On a CPU a U-Net gains nothing from more at once.
MOST_ON_CPU = 16
# Of the free memory, what a training is planned to take: the estimate does not know the libraries' own workspaces, and on a GPU
# the store may lie beside it.
MEMORY_SHARE, GPU_MEMORY_SHARE = 0.85, 0.6


@dataclass(frozen=True)
class DenoiserSettings:
    """`[train-diffusion]` with every `auto` of it decided.

    Attributes:
        table: the settings as given.
        batch_size: deltas a step.
        tune_after: steps on deltas before tuning, 0 for none, or `auto`, as the work was begun with.
        tune_samples: samples a step of tuning; 0: there is none.
        half: bfloat16 autocast.
        make: builds the denoiser; `begin=True` as it is before the first step.
    """

    table: TrainDiffusionTable
    description: DenoiserDescription
    lr: float
    batch_size: int
    tune_after: int | str
    tune_samples: int
    half: bool
    seed: int
    make: Callable[..., Denoiser]

    @property
    def decided(self) -> dict[str, Any]:
        """What the `auto` settings stand for."""
        shapes = ("shape", "fields", "encoders", "schedule", "lengthens")
        kept = {key: value for key, value in self.description.as_json().items() if key not in shapes}
        precision = BFLOAT16 if self.half else FLOAT32
        tuned = {"tune_samples": self.tune_samples} if self.tune_samples else {}
        return {**kept, "lr": self.lr, "batch_size": self.batch_size, "precision": precision, **tuned}

    @property
    def preset(self) -> str:
        return self.description.preset

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of a delta."""
        return tuple(self.description.shape)

    @property
    def denoised(self) -> tuple[int, int]:
        """The shape of what the denoiser is shown."""
        return denoised_shape(self.preset, self.shape)

    @cached_property
    def sketch(self) -> Denoiser:
        """The denoiser without memory: shapes alone."""
        with torch.device("meta"):
            return self.make()

    @cached_property
    def parameters(self) -> int:
        return parameters(self.sketch)

    @cached_property
    def operations(self) -> int:
        return operations(self.sketch)

    @property
    def schedule(self) -> NoiseSchedule:
        rows, columns = self.denoised
        return make_schedule(self.description.schedule, rows * columns, self.description.prediction)


def decide(
    project: Project,
    store: StoreDescription,
    decided: Mapping[str, Any],
    device: torch.device,
    neighbours: EncoderDescription | None = None,
    tune_samples: Callable[[], int] = lambda: 0,
) -> DenoiserSettings:
    """Decide every `auto` of `[train-diffusion]`; `decided` are settings by name, as unfinished work was begun with them;
    `neighbours` is the encoder of what is said of them, where it is; `tune_samples` finds how many are tuned at once.

    Raises:
        SettingsError: settings that do not go together, encoders of fields that do not exist.
    """
    table = project.settings.train_diffusion
    settings, shape = {**table.model_dump(), **decided}, tuple(store.arrays["delta"].shape[1:])
    half = device.type == "cuda" if settings["precision"] == AUTO else settings["precision"] == BFLOAT16
    shapes = {"shape": list(shape), "schedule": settings["schedule"], "lengthens": bool(settings["tune_after"])}
    shapes |= _described_fields(project, store, neighbours)
    factors = store.arrays[DELTA].factors
    if settings["preset"] == VECTOR and not factors:
        raise SettingsError(
            "train-diffusion.preset = 'vector' needs deltas that are kept as factors, and this store has whole ones",
            "use another preset, or collect them with --set collect.store=factored, which takes sgd without weight_decay and a "
            "Linear that sees one vector a sample",
        )

    asked = settings["tune_samples"] if settings["tune_after"] else 0

    def made(preset: str) -> DenoiserSettings:
        found = resolve({**settings, "preset": preset}, shape)
        lr, batch_size = found.pop("lr"), found.pop("batch_size")
        description = DenoiserDescription(**found, **shapes)
        make = partial(build_denoiser, project, description)
        tuned = tune_samples() if asked == AUTO else asked
        return DenoiserSettings(table, description, lr, batch_size, settings["tune_after"], tuned, half, project.seed, make)

    return made(auto_preset(shape, factors=bool(factors)) if settings["preset"] == AUTO else settings["preset"])


def _described_fields(
    project: Project, store: StoreDescription, neighbours: EncoderDescription | None
) -> dict[str, dict[str, Any]]:
    """What the denoiser's description says of the fields and of their encoders."""
    fields, encoders = field_widths(store), described_encoders(project, store)
    if neighbours is not None:
        fields[NEIGHBOURS] = math.prod(neighbours.shape)
        encoders = {**encoders, NEIGHBOURS: neighbours.as_json()}
    return {"fields": fields} | ({"encoders": encoders} if encoders else {})


def free_memory(device: torch.device) -> int:
    """Bytes a training on this device may take; much, where the system does not tell."""
    if device.type == "cuda":
        return int(GPU_MEMORY_SHARE * free_on_gpu(device))
    available = available_memory()
    return 2**63 if available is None else int(MEMORY_SHARE * available) // local_count()


def micro_batch(settings: DenoiserSettings, ranks: int, device: torch.device) -> int:
    """Deltas whose activations are in memory at once, in each rank; on a GPU halved later, where memory runs out.

    Raises:
        TryAgainError: they do not fit; with the figures.
    """
    free, share, asked = free_memory(device), -(-settings.batch_size // ranks), settings.table.micro_batch_size
    on_cpu = device.type == "cpu" and settings.preset in UNETS
    wanted = min(share, asked) if asked != AUTO else min(share, MOST_ON_CPU) if on_cpu else share
    while wanted > 1 and asked == AUTO and training_bytes(settings.sketch, wanted, settings.half) > free:
        wanted = -(-wanted // 2)
    if (needed := training_bytes(settings.sketch, wanted, settings.half)) > free:
        fewer = f"fewer at once with --set {STAGE}.micro_batch_size=auto, " if wanted > 1 else ""
        raise TryAgainError(
            f"training preset {settings.preset} of width {settings.description.width} on deltas of "
            f"{'×'.join(map(str, settings.shape))} takes about {needed:,} bytes of memory with {wanted} at once; "
            f"{free:,} may be taken",
            f"take {fewer}a smaller network with --set {STAGE}.width=N or --set {STAGE}.preset=mlp, or free memory",
        )
    return wanted
