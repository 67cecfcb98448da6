"""Driving a training: checkpoints, metrics, the stopping rule, and continuing exactly where a kill left it."""

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.foundation.errors import ArtifactError, ComputeError
from stages.foundation.files import disk_errors, link_or_copy, remove, sha256_file, sweep, write_bytes
from stages.foundation.interruption import deferred
from stages.foundation.progress import Report
from stages.foundation.tensors import load_tensors, save_tensors
from stages.run_directory.format import CheckpointRecord
from stages.training.plan import Plan, Trained
from stages.training.ranks import Ranks
from stages.training.trainer import LossUnderWay, Trainer
from stages.training.tuning_start import TuningStart

# Scores that have fallen by less than this share since patience began to wait do not make the training go on.
WORTH_WAITING = 0.01
METRICS, CHECKPOINTS = "metrics.jsonl", "checkpoints"


class TrainingRun:
    """A training inside a stage's unfinished folder.

    Every draw depends on (seed, step) alone, so a checkpoint is tensors plus a step; a run that was killed and continued writes
    the same bytes as one that was not.

    Args:
        folder: the unfinished folder.
        fingerprint: of the stage; a checkpoint of another is not continued.
        evaluate: figures of the averaged network, the one called "score" to be minimised.
        blame: which samples the loss of a step, counted from 1, was lost on, in words.
        ranks: the processes that share each batch: all of them take the steps, the first evaluates and writes.
        start: what begins tuning, where the losses decide when.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        trainer: Trainer,
        evaluate: Callable[[], dict[str, float]],
        plan: Plan,
        report: Report,
        blame: Callable[[int], str] = lambda step: "",
        ranks: Ranks | None = None,
        start: TuningStart | None = None,
    ) -> None:
        self._start = start
        self._folder, self._fingerprint, self._trainer = folder, fingerprint, trainer
        self._evaluate, self._plan, self._report = evaluate, plan, report
        self._blame, self._ranks = blame, ranks or Ranks()
        self._best: dict[str, Any] = {}
        # Patience waits for a score clearly below the mark, the one it last began to wait from.
        self._mark: float | None = None
        self._waited = 0
        self._losses: list[float] = []
        self._loss: float | None = None
        self._under_way: deque[tuple[int, LossUnderWay]] = deque()
        self._best_hash = ""
        self._written = time.monotonic()

    def run(self) -> Trained:
        """Train from the newest checkpoint, or from the start, to the end.

        Raises:
            ComputeError: a loss is not finite, or has exploded; checkpoints made before stay.
            KeyboardInterrupt: asked to stop, after a checkpoint of the step reached.
        """
        with disk_errors(self._folder), deferred() as asked:
            self._take_up()
            while not self._ranks.agree_to_stop(asked() or self._is_over()):
                self._take_step()
            self._hear(0)
            if self._ranks.leads:
                self._end()
        tuned_from = self._start.step if self._start else None
        return Trained(self._trainer.step, self._exhausted(), self._best, self._best_path(self._best), tuned_from)

    def _take_up(self) -> None:
        """Begin all ranks where the newest checkpoint is."""
        path = None
        if self._ranks.leads:
            (self._folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            sweep(self._folder)
            path = self._newest()
        if (path := self._ranks.agree(path)) is not None:
            self._trainer.restore(load_tensors(path), int(path.stem))
        self._agree_on_tuning()

    def _agree_on_tuning(self) -> None:
        """The first rank, which evaluates, knows whether it has begun."""
        if self._start is not None:
            self._start.begin(self._ranks.agree(self._start.step))

    def _end(self) -> None:
        """The last checkpoint and evaluation."""
        if not self._record_path(self._trainer.step).exists():
            self._checkpoint()
        if not self._is_over():
            raise KeyboardInterrupt
        if self._trainer.step % self._plan.evaluate_steps:
            # After the checkpoint, so that a longer training goes on as if it had never stopped here.
            self._note_evaluation(self._trainer.step)
        self._prune(1)

    def _is_over(self) -> bool:
        return self._trainer.step >= self._plan.max_steps or self._exhausted()

    def _best_path(self, best: dict[str, Any]) -> Path:
        return self._folder / CHECKPOINTS / f"best-{best.get('step', 0):08d}.safetensors"

    def _record_path(self, step: int) -> Path:
        return self._folder / CHECKPOINTS / f"{step:08d}.json"

    def _exhausted(self) -> bool:
        return 0 < self._plan.patience <= self._waited

    def _take_step(self) -> None:
        """One step; the first rank evaluates after it, tells, and leaves a checkpoint, where it is time."""
        plan, trainer = self._plan, self._trainer
        self._under_way.append((trainer.step + 1, trainer.start()))
        step, late = trainer.step, time.monotonic() - self._written > 60 * plan.checkpoint_minutes
        # The others write nothing, and would be late for ever.
        overdue = late and self._ranks.leads
        evaluates, writes = step % plan.evaluate_steps == 0, step % plan.checkpoint_steps == 0 or overdue
        # A GPU may have one step before it while the next is prepared; what is looked at or kept is known to be sound.
        self._hear(1 if trainer.runs_ahead and not (evaluates or writes) else 0)
        if evaluates and self._ranks.leads:
            figures = self._note_evaluation(step)
            if self._start:
                self._start.look(step, figures["denoising_loss"])
        if evaluates:
            self._agree_on_tuning()
        if not self._ranks.leads:
            return
        figures = {} if self._loss is None else {"loss": self._loss}
        figures |= {"held-out loss": self._best["score"]} if self._best else {}
        self._report.progress(step, plan.max_steps, "steps", **figures)
        if writes:
            self._checkpoint()

    def _hear(self, keep: int) -> None:
        """The losses of the steps under way but the last `keep`.

        Raises:
            ComputeError: one is lost.
        """
        while len(self._under_way) > keep:
            step, wait = self._under_way.popleft()
            self._loss = wait()
            self._require_sane(step, self._loss)
            self._losses.append(self._loss)

    def _require_sane(self, step: int, loss: float) -> None:
        """Refuse to go on from a loss that is lost.

        Raises:
            ComputeError: naming step and samples.
        """
        if math.isfinite(loss) and loss <= self._plan.largest_loss:
            return
        kept = max((int(path.stem) for path in (self._folder / CHECKPOINTS).glob("*.json")), default=0)
        checkpoint = f"; the checkpoint of step {kept:,} is kept" if kept else ""
        what = f"the loss of step {step:,} is {loss:.4g}"
        what += "" if not math.isfinite(loss) else f", more than {self._plan.largest_loss:.4g}: it has exploded"
        raise ComputeError(f"{what}{self._blame(step)}{checkpoint}", self._plan.advice)

    def _note_evaluation(self, step: int) -> dict[str, float]:
        figures = self._evaluate()
        row = {"step": step, "loss": sum(self._losses) / len(self._losses), **figures}
        self._losses = []
        with (self._folder / METRICS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({key: _plain(value) for key, value in row.items()}) + "\n")
        score = figures["score"]
        if not math.isfinite(score):
            raise ComputeError(f"the held-out loss at step {step:,} is {score}", self._plan.advice)
        early = self._start.step is None if self._start else step <= self._plan.patient_until
        if early or self._mark is None or score < self._mark - WORTH_WAITING * abs(self._mark):
            self._mark, self._waited = score, 0
        else:
            self._waited += 1
        if not self._best or score < self._best["score"]:
            self._best = {key: _plain(value) for key, value in row.items()}
            path = self._best_path(row)
            save_tensors(path, self._trainer.snapshot())
            self._best_hash = sha256_file(path)
        return figures

    def _checkpoint(self) -> None:
        """Tensors first, the record last: a checkpoint without its record does not exist. The last two are kept."""
        folder, step = self._folder / CHECKPOINTS, self._trainer.step
        metrics = self._folder / METRICS
        if metrics.exists():
            with metrics.open("rb") as stream:
                os.fsync(stream.fileno())
        path = folder / f"{step:08d}.safetensors"
        save_tensors(path, self._trainer.state())
        CheckpointRecord(
            fingerprint=self._fingerprint,
            step=step,
            sha256=sha256_file(path),
            best=self._best,
            best_sha256=self._best_hash,
            mark=self._mark,
            waited=self._waited,
            losses=self._losses,
            metrics_bytes=metrics.stat().st_size if metrics.exists() else 0,
            tuned_from=self._start.step if self._start else None,
            losses_on_deltas=self._start.losses if self._start else [],
        ).write(self._record_path(step))
        self._prune(2)
        self._written = time.monotonic()

    def _prune(self, keep: int) -> None:
        """Remove all but the newest `keep` checkpoints, and the snapshots none of them refers to."""
        folder = self._folder / CHECKPOINTS
        records = sorted(folder.glob("*.json"))
        for old in records[:-keep]:
            remove(old)
            remove(old.with_suffix(".safetensors"))
        for orphan in folder.glob("[0-9]*.safetensors"):
            if not orphan.with_suffix(".json").exists():
                remove(orphan)
        bests = {self._best_path(best) for path in records[-keep:] if (best := CheckpointRecord.read(path).best)}
        bests |= {self._best_path(self._best)} if self._best else set()
        for path in set(folder.glob("best-*.safetensors")) - bests:
            remove(path)

    def _newest(self) -> Path | None:
        """The tensors of the newest whole checkpoint that is not past the end; what was written after it is forgotten."""
        for path in sorted((self._folder / CHECKPOINTS).glob("*.json"), reverse=True):
            try:
                record = CheckpointRecord.read(path)
                tensors = self._checked(path, record)
                if record.step <= self._plan.max_steps:
                    self._continue_from(record)
                    return tensors
            except (ArtifactError, OSError) as error:
                self._report.message(f"checkpoint {path.stem} is not usable, the one before is taken: {error}")
            remove(path)
        remove(self._folder / METRICS)
        return None

    def _checked(self, path: Path, record: CheckpointRecord) -> Path:
        """The tensors beside a checkpoint's record.

        Raises:
            ArtifactError: they, or the best snapshot, are not what the record says, or are another stage's.
        """
        tensors = path.with_suffix(".safetensors")
        if record.fingerprint != self._fingerprint or sha256_file(tensors) != record.sha256:
            raise ArtifactError(f"{tensors} does not match its record")
        if record.best and sha256_file(self._best_path(record.best)) != record.best_sha256:
            raise ArtifactError(f"{self._best_path(record.best)} does not match its record")
        return tensors

    def _continue_from(self, record: CheckpointRecord) -> None:
        self._best, self._losses, self._best_hash = record.best, list(record.losses), record.best_sha256
        self._mark, self._waited = record.mark, record.waited
        if self._start is not None:
            self._start.losses = list(record.losses_on_deltas)
            self._start.begin(record.tuned_from)
        metrics = self._folder / METRICS
        if metrics.exists():
            write_bytes(metrics, metrics.read_bytes()[: record.metrics_bytes])
        self._report.message(f"continues from step {record.step:,}")


def take_up_training(finished: Path | None, wip: Path) -> None:
    """Begin an unfinished folder from a finished training's checkpoints and metrics, where there is one, to go further."""
    for path in [*(finished / CHECKPOINTS).iterdir(), finished / METRICS] if finished else ():
        link_or_copy(path, wip / path.relative_to(finished))


def _plain(value: float) -> float | int | None:
    """Eight digits of a figure; a metric that is no number for some sample is null."""
    if isinstance(value, int):
        return value
    return float(f"{value:.8g}") if math.isfinite(value) else None
