"""train-diffusion: train the conditional diffusion model of the unit delta (Alg. 1)."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.artifacts.files import digest, link_or_copy, require_memory, require_space, sha256_file, write_json
from stages.artifacts.pipeline import AUTO
from stages.artifacts.progress import Report
from stages.artifacts.project import Project
from stages.artifacts.run_directory import folder_of
from stages.artifacts.store_reader import StoreReader
from stages.artifacts.training_run import Plan, Trained, TrainingRun, take_up_training
from stages.diffusion.dataset import Rows, usable_split
from stages.diffusion.denoisers import Denoiser, make_denoiser, resolve_prediction, resolve_preset, resolve_width, unit
from stages.diffusion.denoising import denoising_loss, judge, step_draws
from stages.diffusion.schedule import make_schedule, schedule_warning
from stages.diffusion.training import Trainer, batch_rows, threads_for
from stages.outcome import Finished, Outcome
from stages.seeds import global_seed
from stages.stage import Stage

DENOISER_FILE, DESCRIPTION_FILE = "denoiser.safetensors", "denoiser.json"


def train_diffusion(project: Project, *, force: bool = False, dry_run: bool = False, report: Report | None = None) -> Outcome:
    """Bring the denoiser up to date.

    Raises:
        OcdError: as `Stage.execute`; a store that does not fit memory, or holds nothing but degenerate rows; a loss that is
            not finite.
    """
    return TrainDiffusion(project, report).execute(force=force, dry_run=dry_run)


class TrainDiffusion(Stage):
    """The stage."""

    name = "train-diffusion"

    def resolved(self) -> dict[str, Any]:
        """What `auto` stands for."""
        preset = resolve_preset(self.settings.preset)
        prediction = resolve_prediction(self.settings.prediction, preset)
        out, columns = self.manifest_of("collect")["store"]["arrays"]["delta"]["shape"][1:]
        width = resolve_width(out * columns) if self.settings.width == AUTO else self.settings.width
        return {
            f"{self.name}.{key}": value for key, value in (("preset", preset), ("prediction", prediction), ("width", width))
        }

    @cached_property
    def _parameters(self) -> int:
        with torch.device("meta"):
            denoiser = make_denoiser(self._description(self.manifest_of("collect")["store"]))
        return sum(p.numel() for p in denoiser.parameters())

    def auto_threads(self) -> int:
        """By the size of a step."""
        return threads_for(self._parameters, self.settings.batch_size)

    def plan(self) -> dict[str, Any]:
        """Steps and parameters."""
        store, size = self.manifest_of("collect")["store"], 4 * self._parameters
        what = f"train {size // 4:,} parameters on {store['samples']:,} deltas, at most {self.settings.max_steps:,} steps"
        return {"what": what, "bytes": 10 * size}

    def work(self, wip: Path) -> Finished:
        """Read the store, train, keep the best averaged weights."""
        settings = self.settings
        require_space(wip, self.plan()["bytes"])
        reader = StoreReader(folder_of(self.project, "collect").found, self.manifest_of("collect")["store"])
        description = self._description(reader.description)
        train, held_out = self._rows(reader)
        schedule = make_schedule(settings.schedule, train.deltas[0].numel(), description["prediction"])
        if warning := schedule_warning(settings.schedule, train.deltas[0].numel()):
            self.report.message(warning)
        denoiser = self._new_denoiser(description, train)
        held_out = held_out.to(self.device)
        batch = min(settings.batch_size, len(train))

        def step_loss(step: int) -> Tensor:
            rows = train.take(batch_rows(len(train), batch, step, self.seed, "train-diffusion")).to(self.device)
            t, noise = step_draws(batch, tuple(rows.deltas.shape[1:]), schedule.steps, self.seed, "train-diffusion", step)
            return denoising_loss(denoiser, schedule, rows, t.to(self.device), noise.to(self.device))

        cosine = settings.max_steps if settings.lr_schedule == "cosine" else None
        optimizer = torch.optim.AdamW(denoiser.parameters(), lr=settings.lr, weight_decay=0.0, fused=True)
        trainer = Trainer(denoiser, optimizer, step_loss, cosine_steps=cosine)
        plan = Plan(settings.max_steps, settings.evaluate_steps, settings.checkpoint_steps, settings.patience)
        self.tell_total(plan.max_steps, "steps")
        trained = TrainingRun(
            wip,
            self.fingerprint,
            trainer,
            lambda: judge(trainer.averaged, schedule, held_out, self.seed),
            lambda: trainer.averaged.state_dict(),
            plan,
            self.report,
        ).run()
        return self._finished(wip, trained, description, denoiser, len(train))

    def extend(self, finished: Path, wip: Path) -> None:
        """Take up the finished training's last checkpoint."""
        take_up_training(finished, wip)

    def _description(self, store: dict[str, Any]) -> dict[str, Any]:
        """What `make_denoiser` needs, and the schedule; kept beside the weights."""
        arrays = store["arrays"]
        resolved = {key.partition(".")[2]: value for key, value in self.resolved().items()}
        fields = {
            name: int(torch.Size(entry["shape"][1:]).numel()) for name, entry in arrays.items() if name in store["fields"]
        }
        settings = {key: getattr(self.settings, key) for key in ("blocks", "schedule")}
        return {**resolved, **settings, "shape": arrays["delta"]["shape"][1:], "fields": fields}

    def _rows(self, reader: StoreReader) -> tuple[Rows, Rows]:
        """Unit deltas and conditioning, for training and held out."""
        names = ["delta", *reader.field_names()]
        require_memory(2 * reader.nbytes(names), "the delta store")
        rho = torch.from_numpy(reader.read("rho"))
        train, held_out = usable_split(torch.from_numpy(reader.read("degenerate")), rho, self.settings.held_out, self.seed)
        deltas = torch.from_numpy(reader.read("delta"))
        for part in torch.arange(len(deltas)).split(4096):
            deltas[part] = unit(deltas[part])
        rows = Rows({name: torch.from_numpy(reader.read(name)) for name in reader.field_names()}, rho, deltas)
        return rows.take(train), rows.take(held_out)

    def _new_denoiser(self, description: dict[str, Any], train: Rows) -> Denoiser:
        with global_seed(self.seed, "train-diffusion", "network"):
            denoiser = make_denoiser(description)
        denoiser.encoder.normalise.fit(train.fields)
        return denoiser.to(self.device)

    def _finished(self, wip: Path, trained: Trained, description: dict[str, Any], denoiser: Denoiser, samples: int) -> Finished:
        link_or_copy(trained.snapshot, wip / DENOISER_FILE)
        write_json(wip / DESCRIPTION_FILE, description)
        summary = {
            "steps": trained.steps,
            "stopped_early": trained.stopped_early,
            "best_step": trained.best["step"],
            "held_out_loss": trained.best["score"],
            "cosine": trained.best["cosine"],
            "cosine_shuffled": trained.best["cosine_shuffled"],
            "samples": samples,
            "parameters": sum(p.numel() for p in denoiser.parameters()),
            **{key: description[key] for key in ("preset", "prediction", "schedule")},
        }
        reached = {"value": self.settings.max_steps, "reached": trained.steps, "exhausted": trained.stopped_early}
        content = digest([sha256_file(wip / DENOISER_FILE), description])
        return Finished(summary, content, {"train-diffusion.max_steps": reached})
