"""The losses of a denoiser's training steps: batches made ready while the last one is computed, micro-batches, precision."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from stages.diffusion.delta_batch import DeltaBatch
from stages.diffusion.denoiser import Denoiser
from stages.diffusion.denoising import denoising_errors
from stages.diffusion.schedule import NoiseSchedule
from stages.foundation.seeds import global_seed
from stages.training.ranks import Ranks
from stages.training.trainer import Stream
from stages.training.tuning import Tuning

# A batch's rows, its steps t (B,) and its noise (B, out, in).
Ready = tuple[DeltaBatch, Tensor, Tensor]


class DenoisingSteps:
    """What a `Trainer` asks for the losses of each step.

    Args:
        batches: opens this rank's share of the batches from a step on.
        batch_size: of the whole batch, all ranks' shares.
        micro_batch: rows whose activations are in memory at a time.
        half: bfloat16 autocast.
        smaller: hears of a micro-batch that had to be halved.
        tuning: from the step `tune_after` on the whole loss, of batches of its own size.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        batches: Callable[[int], Iterator[Ready]],
        *,
        batch_size: int,
        micro_batch: int,
        half: bool,
        ranks: Ranks,
        seed: int,
        smaller: Callable[[int], None] = lambda rows: None,
        tuning: Tuning | None = None,
        tune_after: int = 0,
    ) -> None:
        self._denoiser, self._schedule = denoiser, schedule
        self.batch_size, self.micro_batch, self._half = batch_size, micro_batch, half
        self._ranks, self._seed, self._smaller = ranks, seed, smaller
        self.tuning, self._tune_after = tuning, tune_after
        self._device = next(denoiser.parameters()).device
        self._draws = denoiser.encoder.noise > 0 or any(
            isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0 for module in denoiser.modules()
        )
        self._stream, self._step = Stream(batches), 0

    def __call__(self, step: int) -> Iterator[Tensor]:
        """The losses of a step's micro-batches, each weighted by its share of the whole batch."""
        self._step = step
        rows, t, noise = self._stream.at(step)
        if self._tunes:
            if len(rows):
                with global_seed(self._seed, "train-diffusion", "tune", step, self._ranks.rank):
                    yield self.tuning(self._denoiser, rows, step).sum() / min(self.tuning.samples, self.batch_size)
            return
        for number, start in enumerate(range(0, len(rows), self.micro_batch)):
            part = slice(start, start + self.micro_batch)
            yield self._errors(rows.take(part), t[part], noise[part], step, number).sum() / self.batch_size

    def errors(self) -> tuple[Tensor, Tensor]:
        """The last batch's rows in the store and each one's loss now, (B,) each."""
        rows, t, noise = self._stream.last
        self._denoiser.eval()
        parts = [slice(start, start + self.micro_batch) for start in range(0, len(rows), self.micro_batch)]
        with torch.no_grad():
            found = [self._errors(rows.take(part), t[part], noise[part], self._step, 0).cpu() for part in parts]
        return rows.numbers.cpu(), torch.cat([torch.empty(0), *found])

    def halve(self) -> bool:
        """Take half the micro-batch, where memory ran out; False where there is no half, or a step is not divided."""
        if self.micro_batch == 1 or self._tunes:
            return False
        self.micro_batch = -(-min(self.micro_batch, self.batch_size) // 2)
        torch.cuda.empty_cache()
        self._smaller(self.micro_batch)
        return True

    @property
    def _tunes(self) -> bool:
        return self.tuning is not None and self._step >= self._tune_after

    def _errors(self, rows: DeltaBatch, t: Tensor, noise: Tensor, step: int, number: int) -> Tensor:
        on = rows.to(self._device)
        noise, t = noise.to(self._device, non_blocking=True), t.to(self._device, non_blocking=True)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
            if not self._draws:
                return denoising_errors(self._denoiser, self._schedule, on, t, noise)
            with global_seed(self._seed, "train-diffusion", "dropout", step, self._ranks.rank, number):
                return denoising_errors(self._denoiser, self._schedule, on, t, noise)

    @property
    def waited_seconds(self) -> float:
        return self._stream.waited_seconds
