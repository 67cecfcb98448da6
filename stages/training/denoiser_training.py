"""Everything that takes part in training a denoiser."""

import contextlib
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from stages.diffusion.denoiser import Denoiser
from stages.diffusion.denoisers import UNETS, VECTOR
from stages.diffusion.denoising import step_draws
from stages.foundation.background import made_ahead, read_ahead
from stages.foundation.processes import cores, local_count
from stages.foundation.progress import Report
from stages.foundation.seeds import global_seed
from stages.run_directory.pipeline import AUTO
from stages.store.reader import StoreReader
from stages.training.batches import VECTORS, WHOLE, TrainingBatches
from stages.training.denoiser import STAGE, DenoiserSettings
from stages.training.denoising_steps import DenoisingSteps, Ready
from stages.training.ranks import Ranks
from stages.training.store_neighbours import StoreNeighbours
from stages.training.trainer import Trainer
from stages.training.tuning import Tuning

# Threads that draw noise for a GPU, and what of it may lie ready.
MOST_DRAWING, DRAWN_BYTES = 8, 1 << 30


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
