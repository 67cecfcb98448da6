"""train-diffusion: train the conditional diffusion model of the unit delta (Alg. 1)."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from stages.diffusion.denoising import held_out_figures
from stages.diffusion.schedule import schedule_warning
from stages.foundation.errors import SettingsError
from stages.foundation.files import digest, link_or_copy, require_space, sha256_file, write_json
from stages.foundation.progress import Report
from stages.lifecycle.outcome import Finished, Outcome
from stages.lifecycle.stage import Stage
from stages.overfitting.collector import make_overfitter
from stages.run_directory.folders import folder_of
from stages.run_directory.pipeline import AUTO
from stages.run_directory.project import Project
from stages.store.reader import StoreReader
from stages.training.denoiser import Choice, Training, begin_training, choose_denoiser, micro_batch
from stages.training.encoders import build_denoiser
from stages.training.following import follow
from stages.training.memory import training_bytes
from stages.training.ranks import Ranks
from stages.training.run import Plan, Trained, TrainingRun, take_up_training
from stages.training.trainer import threads_for
from stages.training.tuning import Tuning

DENOISER_FILE, DESCRIPTION_FILE = "denoiser.safetensors", "denoiser.json"
# Predicting nothing gives 1: a hundred times as much is no bad batch.
LARGEST_LOSS = 100.0
# Samples that the ways of running the model are tried on.
PROBE = 2


def train_diffusion(project: Project, *, force: bool = False, dry_run: bool = False, report: Report | None = None) -> Outcome:
    """Bring the denoiser up to date. Under torchrun, its processes share every batch.

    Raises:
        OcdError: as `Stage.execute`; a denoiser that does not fit memory; a store that holds nothing but degenerate rows; a
            loss that is not finite, or has exploded.
    """
    return TrainDiffusion(project, report).execute(force=force, dry_run=dry_run)


class TrainDiffusion(Stage):
    """The stage."""

    name = "train-diffusion"

    def execute(self, *, force: bool = False, dry_run: bool = False) -> Outcome:
        """As `Stage.execute`; of several ranks the first does that, and the others take part in the training."""
        ranks, self._led = self.ranks, False
        try:
            if ranks.leads:
                return super().execute(force=force, dry_run=dry_run)
            if (begun := ranks.agree()) is not None:
                self._follow(begun)
            return Outcome(self.name, {"stage": self.name}, follows=True)
        finally:
            if ranks.leads and not self._led:
                # There was nothing to train: the others need not wait.
                ranks.agree(None)
            ranks.leave()

    @cached_property
    def ranks(self) -> Ranks:
        """This process among those that torchrun started."""
        return Ranks.joined(self.device.type)

    @cached_property
    def _planned(self) -> Choice:
        """The denoiser as the settings have it now."""
        return self._choice(self.settings.model_dump())

    def _choice(self, settings: dict[str, Any]) -> Choice:
        return choose_denoiser(self.project, self.manifest_of("collect")["store"], settings, self.device)

    def resolved(self) -> dict[str, Any]:
        """What `auto` stands for."""
        return {f"{self.name}.{key}": value for key, value in self._planned.settings.items()}

    def auto_threads(self) -> int:
        """By the size of a step."""
        if self.settings.tune_after:
            # The model's own passes are the larger part of it.
            return torch.get_num_threads()
        return threads_for(self._planned.operations, self._planned.batch_size)

    def plan(self) -> dict[str, Any]:
        """Steps, parameters, memory, and bytes on the disk."""
        size, samples = self._planned.parameters, self.manifest_of("collect")["store"]["samples"]
        choice, micro = self._planned, self._micro_batch(self._planned)
        memory = training_bytes(choice.sketch, micro, choice.half)
        what = f"train {size:,} parameters on {samples:,} deltas, at most {self.settings.max_steps:,} steps"
        what += f", in about {memory / 2**30:.1f} GiB of memory beside the store"
        return {"what": what, "preset": choice.description["preset"], "memory_bytes": memory, "bytes": 40 * size}

    def check(self) -> None:
        """Tuning begins before the end, the encoders fit their fields, and the training fits memory."""
        after, last = self.settings.tune_after, self.settings.max_steps
        if after >= last:
            raise SettingsError(
                f"train-diffusion.tune_after = {after:,}, but the training ends at max_steps = {last:,}: nothing is tuned",
                f"give it fewer than {last:,} steps on deltas, or 0 for no tuning",
            )
        if self._planned.description.get("encoders"):
            build_denoiser(self.project, self._planned.description, begin=True)
        self._micro_batch(self._planned)

    def _micro_batch(self, choice: Choice) -> int:
        """Deltas in memory at once, in each rank."""
        share = -(-choice.batch_size // self.ranks.count)
        return micro_batch(choice, share, self.settings.micro_batch_size, self.device)

    def work(self, wip: Path) -> Finished:
        """Train, keep the best averaged weights."""
        # Of unfinished work, what `auto` stood for when it was begun.
        prefix = f"{self.name}."
        begun = {key.removeprefix(prefix): value for key, value in self._identity["settings"].items() if key.startswith(prefix)}
        choice = self._choice(self.settings.model_dump() | begun)
        require_space(wip, 40 * choice.parameters)
        kept = self.keep_execution(micro_batch_size=self._micro_batch(choice))["micro_batch_size"]
        micro = kept if self.settings.micro_batch_size == AUTO else self._micro_batch(choice)
        self._led = True
        self.ranks.agree({"settings": begun, "micro_batch": micro, "threads": torch.get_num_threads()})
        training = self._training(choice, micro)
        if warning := schedule_warning(self.settings.schedule, len(training.rows.held_out.deltas[0].flatten())):
            self.report.message(warning)
        preset = choice.description["preset"]
        self.report.message(f"{preset}, {choice.parameters:,} parameters; the store is {training.rows.place}")
        self.tell_total(self.settings.max_steps, "steps")
        return self._finished(wip, self._run(wip, choice, training), choice, training.rows.count)

    def _training(self, choice: Choice, micro: int) -> Training:
        reader = StoreReader(folder_of(self.project, "collect").found, self.manifest_of("collect")["store"])

        def smaller(left: int) -> None:
            self.report.message(f"memory ran out: from here on {left} deltas at once")
            if self.ranks.leads:
                self.change_execution(micro_batch_size=left)

        return begin_training(choice, reader, micro, self.device, self.ranks, smaller, self._tuning(choice, reader))

    def _tuning(self, choice: Choice, reader: StoreReader) -> Tuning | None:
        settings, whole = self.settings, self.splits["all"]
        if not settings.tune_after:
            return None
        collect, rows = self.project.settings.collect, self.splits["train"]
        probe = rows.batch([i % len(rows) for i in range(PROBE)])
        overfitter = make_overfitter(self.task, self.base_to_overfit, self.layer, collect, probe)
        index = torch.from_numpy(reader.read("sample_index"))
        # Some losses are negative, such as a density's. Where the base fits everything, in units of 1e-12.
        loss_size = max(1e-12, float(abs(reader.read("base_loss").astype(float)).mean()))
        given = (self.task, overfitter, whole, index, loss_size, choice.schedule, self.seed)
        return Tuning(*given, settings.tune_samples)

    def _run(self, wip: Path, choice: Choice, training: Training) -> Trained:
        settings, trainer, steps = self.settings, training.trainer, training.steps
        plan = Plan(
            settings.max_steps,
            settings.evaluate_steps,
            settings.checkpoint_steps,
            settings.patience,
            settings.checkpoint_minutes,
            LARGEST_LOSS,
            f"try a smaller learning rate: --set {self.name}.lr={choice.lr / 4:g} --force",
            # Of what tuning will do nothing is known before.
            settings.tune_after,
        )
        held_out, schedule = training.rows.held_out.to(self.device), choice.schedule
        return TrainingRun(
            wip,
            self.fingerprint,
            trainer,
            lambda: self._held_out(
                held_out_figures(trainer.averaged, schedule, held_out, self.seed, steps.micro_batch), training
            ),
            lambda: trainer.averaged.state_dict(),
            plan,
            self.report,
            training.blame,
            self.ranks,
        ).run()

    def _held_out(self, figures: dict[str, float], training: Training) -> dict[str, float]:
        """Figures of the deltas; where they are tuned, what they do to the task's loss decides."""
        if (tuning := training.steps.tuning) is None:
            return figures
        found = tuning.held_out_loss(training.trainer.averaged, training.rows.held_out)
        return {**figures, "score": found, "denoising_loss": figures["score"]}

    def _follow(self, begun: dict[str, Any]) -> None:
        """Take part in the training that rank 0 drives."""
        torch.set_num_threads(begun["threads"])
        choice = self._choice(self.settings.model_dump() | begun["settings"])
        follow(self._training(choice, begun["micro_batch"]).trainer, self.ranks)

    def extend(self, finished: Path, wip: Path) -> None:
        """Take up the finished training's last checkpoint."""
        take_up_training(finished, wip)

    def _finished(self, wip: Path, trained: Trained, choice: Choice, samples: int) -> Finished:
        link_or_copy(trained.snapshot, wip / DENOISER_FILE)
        write_json(wip / DESCRIPTION_FILE, choice.description)
        summary = {
            "steps": trained.steps,
            "stopped_early": trained.stopped_early,
            "best_step": trained.best["step"],
            "held_out_loss": trained.best.get("denoising_loss", trained.best["score"]),
            **({"held_out_task_loss": trained.best["score"]} if self.settings.tune_after else {}),
            "cosine": trained.best["cosine"],
            "cosine_shuffled": trained.best["cosine_shuffled"],
            "samples": samples,
            "parameters": choice.parameters,
            **{key: choice.description[key] for key in ("preset", "prediction", "schedule")},
        }
        reached = {"value": self.settings.max_steps, "reached": trained.steps, "exhausted": trained.stopped_early}
        content = digest([sha256_file(wip / DENOISER_FILE), choice.description])
        return Finished(summary, content, {"train-diffusion.max_steps": reached})
