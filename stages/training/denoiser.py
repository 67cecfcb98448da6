"""Which denoiser a run trains, whether it fits memory, and everything that takes part in training it."""

import contextlib
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from stages.diffusion.denoiser import Denoiser
from stages.diffusion.denoisers import UNETS, VECTOR, auto_preset, denoised_shape, resolve
from stages.diffusion.denoising import step_draws
from stages.diffusion.neighbour_encoder import NEIGHBOURS
from stages.diffusion.schedule import NoiseSchedule, make_schedule
from stages.foundation.background import made_ahead, read_ahead
from stages.foundation.config import TrainDiffusionTable
from stages.foundation.errors import SettingsError, TryAgainError
from stages.foundation.files import available_memory
from stages.foundation.memory import free_on_gpu
from stages.foundation.processes import cores, local_count
from stages.foundation.progress import Report
from stages.foundation.seeds import global_seed
from stages.run_directory.descriptions import DenoiserDescription, EncoderDescription
from stages.run_directory.format import StoreDescription
from stages.run_directory.pipeline import AUTO
from stages.run_directory.project import Project
from stages.store.delta_store import DELTA
from stages.store.reader import StoreReader, field_widths
from stages.training.batches import VECTORS, WHOLE, TrainingBatches
from stages.training.denoising_steps import DenoisingSteps, Ready
from stages.training.encoders import build_denoiser, described_encoders
from stages.training.memory import operations, parameters, training_bytes
from stages.training.ranks import Ranks
from stages.training.store_neighbours import StoreNeighbours
from stages.training.trainer import Trainer
from stages.training.tuning import Tuning

STAGE = "train-diffusion"
FLOAT32, BFLOAT16 = "float32", "bfloat16"
# On a CPU a U-Net gains nothing from more at once.
MOST_ON_CPU = 16
# Of the free memory, what a training is planned to take: the estimate does not know the libraries' own workspaces, and on a GPU
# the store may lie beside it.
MEMORY_SHARE, GPU_MEMORY_SHARE = 0.85, 0.6
# Threads that draw noise for a GPU, and what of it may lie ready.
MOST_DRAWING, DRAWN_BYTES = 8, 1 << 30


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
    shapes = {"shape": list(shape), "fields": field_widths(store), "schedule": settings["schedule"]}
    shapes["lengthens"] = bool(settings["tune_after"])
    if encoders := described_encoders(project, store):
        shapes["encoders"] = encoders
    if neighbours is not None:
        shapes["fields"][NEIGHBOURS] = math.prod(neighbours.shape)
        shapes["encoders"] = {**encoders, NEIGHBOURS: neighbours.as_json()}

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


class Training:
    """What takes part in training a denoiser, `micro` deltas at once, made anew, as it is before the first step."""

    def __init__(
        self,
        settings: DenoiserSettings,
        reader: StoreReader,
        micro: int,
        device: torch.device,
        ranks: Ranks,
        smaller: Callable[[int], None],
        report: Report,
        tuning: Tuning | None = None,
        neighbours: StoreNeighbours | None = None,
    ) -> None:
        self._settings, self._device, self._ranks, self._report = settings, device, ranks, report
        table = settings.table
        wanted = {"held_out": table.held_out, "batch_size": settings.batch_size, "memory": table.store_memory}
        wanted["neighbours"] = neighbours
        deltas = VECTORS if settings.preset == VECTOR else WHOLE
        self.batches = TrainingBatches(reader, deltas=deltas, seed=settings.seed, device=device, **wanted)
        self.denoiser = self._new_denoiser()
        self.steps = DenoisingSteps(
            self.denoiser,
            settings.schedule,
            lambda step: read_ahead(self._ready(step)),
            batch_size=self.batches.batch_size,
            micro_batch=micro,
            half=settings.half,
            ranks=ranks,
            seed=settings.seed,
            smaller=smaller,
            compiled=self._fuses or table.compile is True,
            plain=self._plain,
            tuning=tuning,
            tune_after=None if settings.tune_after == AUTO else settings.tune_after,
        )
        self.trainer = self._new_trainer()

    def _new_denoiser(self) -> Denoiser:
        settings = self._settings
        with global_seed(settings.seed, STAGE, "network"):
            denoiser = settings.make(begin=True)
        denoiser.encoder.normalise.fit(self.batches.parts())
        denoiser.encoder.noise = settings.table.conditioning_noise
        if denoiser.lengths is not None:
            denoiser.lengths.mean.fill_(float(self.batches.rho.double().mean()))
        if self._device.type == "cuda" and settings.preset in UNETS:
            return denoiser.to(self._device, memory_format=torch.channels_last)
        return denoiser.to(self._device)

    def _new_trainer(self) -> Trainer:
        table, trained = self._settings.table, [p for p in self.denoiser.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self._settings.lr, weight_decay=0.0, fused=True)
        cosine = table.max_steps if table.lr_schedule == "cosine" else None
        trainer = Trainer(self.denoiser, optimizer, self.steps, cosine_steps=cosine, ranks=self._ranks)
        # After the trainer has made its copy, which is evaluated as it is.
        if self._fuses:
            self.denoiser.fuse(True)
        elif table.compile is True:
            self.denoiser.compile(dynamic=False)
        return trainer

    @property
    def _fuses(self) -> bool:
        """Whether a compiler, where torch has one, fuses the norms of a U-Net on a GPU."""
        on_gpu = self._device.type == "cuda" and importlib.util.find_spec("triton") is not None
        return on_gpu and self._settings.table.compile == AUTO and self._settings.preset in UNETS

    def _plain(self, reason: str) -> None:
        self._report.message(f"torch.compile failed, training goes on without it: {reason}")
        if self._fuses:
            self.denoiser.fuse(False)

    def _ready(self, step: int) -> Iterator[Ready]:
        """This rank's share of each batch from a step on, of tuning that of its first rows; made in a thread of its own."""
        size = self.batches.batch_size
        begins = self.steps.tune_after if self.steps.tuning else None
        on_deltas = None if begins is None else max(0, begins - step)
        yield from itertools.islice(self._shares(self._ranks.share(size), step), on_deltas)
        yield from self._shares(self._ranks.share(min(self._settings.tune_samples, size)), step + on_deltas)

    def _shares(self, share: slice, step: int) -> Iterator[Ready]:
        """A part of each batch from a step on, with its draws, those of the whole batch."""
        on_gpu = self._device.type == "cuda"
        draw = partial(self._drawn, share)
        made = made_ahead(draw, step, self._drawing_threads()) if on_gpu else (draw(number) for number in itertools.count(step))
        with contextlib.closing(made) as draws:
            for batch, drawn in zip(self.batches.batches(step, share), draws, strict=True):
                yield (batch.pinned() if on_gpu else batch, *drawn)

    def _drawn(self, share: slice, step: int) -> tuple[Tensor, Tensor]:
        """t and the noise of a part of a step's batch."""
        settings = self._settings
        found = step_draws(self.batches.batch_size, settings.denoised, settings.schedule.steps, settings.seed, STAGE, step)
        if self._device.type != "cuda":
            return tuple(value[share] for value in found)
        return tuple(value[share].pin_memory() for value in found)

    def _drawing_threads(self) -> int:
        """Threads that draw noise: a GPU takes less time for a small network's step than one core for its noise."""
        each = 4 * self.batches.batch_size * math.prod(self._settings.denoised)
        return max(1, min(MOST_DRAWING, cores() // local_count() - 2, DRAWN_BYTES // each))

    def blame(self, step: int) -> str:
        """The samples whose loss is worst in the batch of a step, counted from 1, for a message."""
        return self.batches.blame(*self.steps.errors(step - 1))
