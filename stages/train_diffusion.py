"""train-diffusion: train the conditional diffusion model of the unit delta (Alg. 1)."""

import contextlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from stages.diffusion.denoisers import VECTOR
from stages.diffusion.denoising import held_out_figures
from stages.diffusion.schedule import schedule_warning
from stages.foundation.errors import ComputeError, SettingsError
from stages.foundation.files import digest, link_or_copy, require_space, sha256_file
from stages.foundation.float32 import fast_float32
from stages.foundation.memory import ran_out
from stages.foundation.progress import Report
from stages.foundation.threads import set_threads
from stages.foundation.torch_state import repeatable, usual_torch
from stages.lifecycle.context import RunContext
from stages.lifecycle.results import CommandResult, WorkResult
from stages.lifecycle.stage import Stage
from stages.overfitting.overfitter import Overfitter
from stages.prediction.for_training import auto_tune_samples, neighbour_search, overfitter_of, store_of, tuning_of
from stages.run_directory.format import StoreDescription
from stages.run_directory.pipeline import AUTO
from stages.run_directory.project import Project
from stages.run_directory.states import PARTIAL
from stages.training.bank import BANK_FILE
from stages.training.batches import TrainingBatches
from stages.training.denoiser import DenoiserSettings, decide, micro_batch
from stages.training.denoiser_training import Training
from stages.training.memory import training_bytes
from stages.training.plan import Plan, Trained
from stages.training.ranks import Ranks
from stages.training.retrieval import WHERE
from stages.training.run import TrainingRun, take_up_training
from stages.training.store_neighbours import NeighbourSearch
from stages.training.summary import of_conditioning, of_tuning
from stages.training.trainer import threads_for
from stages.training.tuning_start import TuningStart

DENOISER_FILE, DESCRIPTION_FILE = "denoiser.safetensors", "denoiser.json"
# Predicting nothing gives 1: a hundred times as much is no bad batch.
LARGEST_LOSS = 100.0


def train_diffusion(
    project: Project, *, force: bool = False, dry_run: bool = False, report: Report | None = None
) -> CommandResult:
    """Bring the denoiser up to date. Under torchrun, its processes share every batch.

    Raises:
        OcdError: as `Stage.execute`; a denoiser that does not fit memory; a store that holds nothing but degenerate rows; a
            loss that is not finite, or has exploded.
    """
    return TrainDiffusion(RunContext(project, report)).execute(force=force, dry_run=dry_run)


class TrainDiffusion(Stage):
    """Trains the denoiser on the store; under torchrun with other processes, of which the first leads."""

    name = "train-diffusion"
    takes_less_memory = (
        "take fewer deltas at once with --set {name}.micro_batch_size=N, a smaller network with --set {name}.width=N or "
        "--set {name}.preset=mlp, or free memory"
    )

    @usual_torch()
    def execute(self, *, force: bool = False, dry_run: bool = False) -> CommandResult:
        """As `Stage.execute`, in the first process; the others train with it, once it has begun."""
        ranks = self.ranks
        try:
            return super().execute(force=force, dry_run=dry_run) if ranks.leads else self._take_part()
        finally:
            ranks.leave()

    def _take_part(self) -> CommandResult:
        """What the process that leads begins, trained together with it: it speaks for both."""
        if (begun := self.ranks.begun()) is not None:
            set_threads(begun["threads"])
            settings = self.decided(begun["settings"])
            try:
                self._run(self.folder.wip, "", settings, self.training(settings, begun["micro_batch"]))
            except ComputeError as error:
                # What is wrong is said once, by the process that leads; of this one's memory that knows nothing.
                if ran_out(error):
                    raise
        return CommandResult(self.name, {"stage": self.name}, follows=True)

    @cached_property
    def ranks(self) -> Ranks:
        """This process among those that torchrun started."""
        return Ranks.joined(self.context.device.type)

    @cached_property
    def _store(self) -> StoreDescription:
        return self.context.manifest_of("collect").store

    @cached_property
    def _planned(self) -> DenoiserSettings:
        """The denoiser as the settings have it now."""
        return self.decided({})

    def decided(self, known: dict[str, Any]) -> DenoiserSettings:
        """The settings with every `auto` decided, those in `known` as they have been."""
        context, near = self.context, self._search.described[0] if self._search else None
        return decide(context.project, self._store, known, context.device, near, self._auto_tune_samples)

    def _auto_tune_samples(self) -> int:
        return auto_tune_samples(self.context, self._overfitter)

    @cached_property
    def _overfitter(self) -> Overfitter:
        return overfitter_of(self.context)

    @cached_property
    def _search(self) -> NeighbourSearch | None:
        asked = self.settings.neighbours
        return neighbour_search(self.context, self._overfitter) if asked else None

    def resolved(self) -> dict[str, Any]:
        return {f"{self.name}.{key}": value for key, value in self._planned.decided.items()}

    def auto_threads(self) -> int:
        """By the size of a step."""
        if self.settings.tune_after:
            # The model's own passes are the larger part of it.
            return torch.get_num_threads()
        return threads_for(self._planned.operations, self._planned.batch_size)

    def plan(self) -> dict[str, Any]:
        # What goes on keeps what it was begun with.
        found = self._state(force=False)
        planned = self.decided(self._own(found.identity.settings)) if found.state == PARTIAL else self._planned
        memory = training_bytes(planned.sketch, self.micro_batch(planned), planned.half)
        what = f"train {planned.parameters:,} parameters on {self._store.samples:,} deltas, "
        what += f"at most {self.settings.max_steps:,} steps, in about {memory / 2**30:.1f} GiB of memory beside the store"
        return {"what": what, "preset": planned.preset, "memory_bytes": memory, "bytes": 40 * planned.parameters}

    def check(self) -> None:
        """Tuning begins before the end, and its task loads; the encoders fit their fields, and the training fits memory."""
        after, last = self.settings.tune_after, self.settings.max_steps
        if after != AUTO and after >= last:
            raise SettingsError(
                f"train-diffusion.tune_after = {after:,}, but the training ends at max_steps = {last:,}: nothing is tuned",
                f"give it fewer than {last:,} steps on deltas, or 0 for no tuning",
            )
        if after:
            self.context.task  # noqa: B018 (and the libraries that it imports, before their threads are set)
        if self._planned.description.encoders:
            self._planned.make(begin=True)
        self.micro_batch(self._planned)

    def micro_batch(self, settings: DenoiserSettings) -> int:
        """Deltas in memory at once, in each process."""
        return micro_batch(settings, self.ranks.count, self.context.device)

    def begin(self, finished: Path | None) -> None:
        """Settle what is in memory at once; take up a finished training's last checkpoint, where there is one."""
        work, settings = self.unfinished, self._denoiser
        if self._search:
            # Before the other processes look for what is found.
            self._search.found  # noqa: B018
        require_space(work.path, 40 * settings.parameters)
        take_up_training(finished, work.path)
        micro = self.micro_batch(settings)
        if self.settings.micro_batch_size != AUTO:
            work.forget_execution()
        work.keep_execution(micro_batch_size=micro)
        work.tell_total(self.settings.max_steps, "steps")

    @cached_property
    def _denoiser(self) -> DenoiserSettings:
        """The denoiser as the work was begun with it."""
        return self.decided(self._begun_settings())

    def _begun_settings(self) -> dict[str, Any]:
        """What the settings were when the work was begun, every `auto` decided."""
        return self._own(self.unfinished.begun.identity.settings)

    def _own(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Those of this stage, of settings by dotted name."""
        prefix = f"{self.name}."
        return {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}

    def work(self, folder: Path) -> WorkResult:
        """Train, keep the best averaged weights."""
        settings, micro = self._denoiser, self.unfinished.execution["micro_batch_size"]
        self.ranks.begin({"settings": self._begun_settings(), "micro_batch": micro, "threads": torch.get_num_threads()})
        training = self.training(settings, micro)
        if warning := schedule_warning(self.settings.schedule, len(training.batches.held_out.deltas[0].flatten())):
            self.report.message(warning)
        self.report.message(
            f"{settings.preset}{self._why(settings)}, {settings.parameters:,} parameters; the store is {training.batches.place}"
        )
        trained = self._run(folder, self.unfinished.fingerprint, settings, training)
        return self._result(folder, trained, settings, training.batches)

    def _why(self, settings: DenoiserSettings) -> str:
        """What decided the preset, where that was not the user."""
        size = "×".join(map(str, settings.shape))
        of_what = "deltas of which the store keeps factors" if settings.preset == VECTOR else f"deltas of {size}"
        return f" (auto, for {of_what})" if self.settings.preset == AUTO else ""

    def training(self, settings: DenoiserSettings, micro: int) -> Training:
        """What takes part in the training, `micro` deltas at once."""
        reader = store_of(self.context)

        def smaller(left: int) -> None:
            self.report.message(f"memory ran out: from here on {left} deltas at once")
            if self.ranks.leads:
                self.unfinished.change_execution(micro_batch_size=left)

        near = self._search.found if self._search else None
        tuning = tuning_of(self.context, settings, near, self._overfitter) if self.settings.tune_after else None
        return Training(settings, reader, micro, self.context.device, self.ranks, smaller, self.report, tuning, near)

    def _run(self, folder: Path, fingerprint: str, settings: DenoiserSettings, training: Training) -> Trained:
        table, trainer = self.settings, training.trainer
        # Of what tuning will do nothing is known before.
        start = TuningStart(training.steps.tune_from) if settings.tune_after == AUTO else None
        plan = Plan.of(table, self.name, LARGEST_LOSS, settings.lr, patient_until=0 if start else settings.tune_after)
        evaluate = self._evaluation(settings, training)
        exactness = fast_float32() if settings.half else contextlib.nullcontext()
        with repeatable(self.context.device), exactness:
            run = TrainingRun(folder, fingerprint, trainer, evaluate, plan, self.report, training.blame, self.ranks, start)
            try:
                return run.run()
            finally:
                training.steps.close()

    def _evaluation(self, settings: DenoiserSettings, training: Training) -> Callable[[], dict[str, float]]:
        """Figures of the held-out deltas; where they are tuned, what they do to the task's loss decides."""
        held_out, schedule = training.batches.held_out.to(self.context.device), settings.schedule
        averaged, steps, seed = training.trainer.averaged, training.steps, self.context.seed

        def figures() -> dict[str, float]:
            with steps.precision():
                found = steps.at_once.whole(lambda size: held_out_figures(averaged, schedule, held_out, seed, size))
            if steps.tuning is None:
                return found
            own = training.batches.held_out
            score = steps.at_once.whole(lambda size: steps.tuning.held_out_loss(averaged, own, size, steps.precision))
            return {
                **found,
                "score": score,
                "denoising_loss": found["score"],
                "judged_samples": steps.tuning.judged_samples(own),
            }

        return figures

    def _result(self, folder: Path, trained: Trained, settings: DenoiserSettings, batches: TrainingBatches) -> WorkResult:
        link_or_copy(trained.snapshot, folder / DENOISER_FILE)
        description = settings.description
        if self._search:
            near = self._search.found
            description = description.changed(neighbours=near.known)
            link_or_copy(near.bank_file, folder / BANK_FILE)
        description.write(folder / DESCRIPTION_FILE)
        best = trained.best
        summary = {
            "steps": trained.steps,
            "stopped_early": trained.stopped_early,
            "best_step": best["step"],
            "held_out_loss": best.get("denoising_loss", best["score"]),
            **of_tuning(trained, settings.tune_after, self.report),
            "held_out_samples": batches.held_out_samples,
            "cosine": best["cosine"],
            "cosine_shuffled": best["cosine_shuffled"],
            **of_conditioning(best, batches),
            "samples": batches.count,
            "parameters": settings.parameters,
            **{key: getattr(settings.description, key) for key in ("preset", "prediction", "schedule")},
        }
        files = [DENOISER_FILE, *([BANK_FILE] if description.neighbours else [])]
        content = digest([*(sha256_file(folder / name) for name in files), description.as_json()])
        extents = {"train-diffusion.max_steps": trained.extent(self.settings.max_steps)}
        chosen = {WHERE: description.neighbours.where} if description.neighbours else {}
        if trained.tuned_from is not None:
            chosen |= {"train-diffusion.tune_after": trained.tuned_from}
        return WorkResult(summary, content, extents, chosen=chosen)
