"""The losses of a denoiser's training steps: batches made ready while the last one is computed, micro-batches, precision."""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from stages.diffusion.delta_batch import DeltaBatch
from stages.diffusion.denoiser import Denoiser
from stages.diffusion.denoising import denoising_errors
from stages.diffusion.schedule import NoiseSchedule
from stages.foundation.memory import AtOnce, ran_out
from stages.foundation.seeds import global_seed
from stages.training.ranks import Ranks
from stages.training.trainer import Stream
from stages.training.tuning import Tuning

# A batch's rows, its steps t (B,) and its noise (B, out, in).
Ready = tuple[DeltaBatch, Tensor, Tensor]
# The packages of torch's compiler.
COMPILERS = {"_dynamo", "_inductor", "triton"}


class DenoisingSteps:
    """What a `Trainer` asks for the losses of each step.

    Args:
        batches: opens this rank's share of the batches from a step on.
        batch_size: of the whole batch, all ranks' shares.
        micro_batch: rows whose activations are in memory at a time.
        half: bfloat16 autocast.
        smaller: hears of a micro-batch that had to be halved.
        compiled: whether the denoiser, or a part of it, is; where that fails, `plain` hears why, and training goes on without.
        tuning: the whole loss after `tune_after` steps, of batches of its own size; None there: once `tune_from` is called.
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
        compiled: bool = False,
        plain: Callable[[str], None] = lambda reason: None,
        tuning: Tuning | None = None,
        tune_after: int | None = 0,
    ) -> None:
        self._denoiser, self._schedule = denoiser, schedule
        self.batch_size, self._half, self._ranks, self._seed = batch_size, half, ranks, seed
        self.at_once = AtOnce(micro_batch, tell=smaller)
        self.tuning, self.tune_after = tuning, tune_after
        self._device = next(denoiser.parameters()).device
        self._draws = denoiser.encoder.noise > 0 or any(
            isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0 for module in denoiser.modules()
        )
        self._stream, self._rows = Stream(batches), batch_size
        self._step: int | None = None
        # Nothing is known of a compiled denoiser until it has taken a step.
        self._untried, self._plain, self._eager = compiled, plain, False

    @property
    def micro_batch(self) -> int:
        """Rows whose activations are in memory at a time; halved where memory runs out."""
        return self.at_once.rows

    def __call__(self, step: int) -> Iterator[Tensor]:
        """The losses of a step's micro-batches, each weighted by its share of the whole batch."""
        if self._step is not None and step > self._step:
            self._untried = False
        self._step = step
        rows, t, noise = self._stream.at(step)
        self._rows = len(rows)
        whole = min(self.tuning.samples, self.batch_size) if self._tunes else self.batch_size
        for number, start in enumerate(range(0, len(rows), self.micro_batch)):
            part = slice(start, start + self.micro_batch)
            if self._tunes:
                yield self._tuned(rows.take(part), step, number).sum() / whole
            else:
                yield self._errors(rows.take(part), t[part], noise[part], step, number).sum() / whole

    def errors(self, step: int) -> tuple[Tensor, Tensor]:
        """The rows in the store of a step's batch and each one's loss now, (B,) each."""
        rows, t, noise = self._stream.at(step)
        self._denoiser.eval()
        parts = [slice(start, start + self.micro_batch) for start in range(0, len(rows), self.micro_batch)]
        with torch.no_grad():
            found = [self._errors(rows.take(part), t[part], noise[part], step, 0).cpu() for part in parts]
        return rows.numbers.cpu(), torch.cat([torch.empty(0), *found])

    def recovers(self, error: Exception) -> bool:
        """Whether a step may be tried again: with half the micro-batch where memory ran out, uncompiled where that failed."""
        if ran_out(error):
            return self.at_once.halve(min(self.micro_batch, self._rows))
        if not self._untried or not _of_compiler(error):
            return False
        self._untried, self._eager = False, True
        # torch says where, and in the next line what.
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        self._plain(" ".join(said[:2]) or type(error).__name__)
        return True

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """What the denoiser's passes run under."""
        eager = torch.compiler.set_stance("force_eager") if self._eager else contextlib.nullcontext()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half), eager:
            yield

    def close(self) -> None:
        """End the threads that make batches ready."""
        self._stream.close()

    @property
    def _tunes(self) -> bool:
        return self.tuning is not None and self.tune_after is not None and self._step >= self.tune_after

    def tune_from(self, step: int) -> None:
        """Tune after so many steps; what is made ready for others is dropped."""
        self.tune_after = step
        self._stream.close()

    def _errors(self, rows: DeltaBatch, t: Tensor, noise: Tensor, step: int, number: int) -> Tensor:
        on = rows.to(self._device)
        noise, t = noise.to(self._device, non_blocking=True), t.to(self._device, non_blocking=True)
        with self.precision():
            if not self._draws:
                return denoising_errors(self._denoiser, self._schedule, on, t, noise)
            with global_seed(self._seed, "train-diffusion", "dropout", step, self._ranks.rank, number):
                return denoising_errors(self._denoiser, self._schedule, on, t, noise)

    def _tuned(self, rows: DeltaBatch, step: int, number: int) -> Tensor:
        # What is not divided keeps the seed it had when nothing was.
        more = [number] if number else []
        with global_seed(self._seed, "train-diffusion", "tune", step, self._ranks.rank, *more):
            return self.tuning(self._denoiser, rows, step, self.precision)

    @property
    def waited_seconds(self) -> float:
        return self._stream.waited_seconds


def _of_compiler(error: BaseException | None) -> bool:
    """Whether it was raised inside torch's compiler or by the code that this has made."""
    if error is None:
        return False
    files = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(COMPILERS & {*Path(name).parts} for name in files) or _of_compiler(error.__cause__)
