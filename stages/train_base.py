"""train-base: train the base network, or import its weights; every later stage uses exactly these."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.foundation.files import sha256_file
from stages.foundation.progress import Report
from stages.foundation.seeds import global_seed
from stages.foundation.tensors import import_weights, load_tensors, save_model
from stages.foundation.trees import to_device
from stages.lifecycle.materials import BASE_FILE
from stages.lifecycle.outcome import Finished, Outcome
from stages.lifecycle.stage import Stage
from stages.per_sample.capture import watched_modules
from stages.per_sample.layer import find_layer
from stages.run_directory.pipeline import AUTO
from stages.run_directory.project import Project
from stages.run_directory.sources import data_path
from stages.tasks.data import Split
from stages.tasks.loader import check_task, losses, naming_rows
from stages.tasks.protocol import uses_default
from stages.tasks.scoring import evaluate, finite
from stages.tasks.user_code import user_code
from stages.training.run import Plan, TrainingRun, take_up_training
from stages.training.trainer import Trainer, batch_rows


def train_base(project: Project, *, force: bool = False, dry_run: bool = False, report: Report | None = None) -> Outcome:
    """Bring the base up to date.

    Raises:
        OcdError: as `Stage.execute`, and for weights that do not fit, losses that are not finite, and faults of the task.
    """
    return TrainBase(project, report).execute(force=force, dry_run=dry_run)


class TrainBase(Stage):
    """The stage."""

    name = "train-base"

    def plan(self) -> dict[str, Any]:
        """Epochs and samples, or the file to import."""
        size = sum(value.numel() * value.element_size() for value in self.new_model().state_dict().values())
        weights = data_path(self.project, "weights")
        if weights is not None:
            return {"what": f"import {weights.name}", "bytes": size}
        return {"what": f"train {self.settings.epochs} epochs on {len(self.splits['train']):,} samples", "bytes": size}

    def check(self) -> None:
        """The weights fit, a batch goes through model and loss, and what later stages need is there: nobody should train for
        hours first."""
        for split in (self.splits["train"], self.splits["validation"], self.test_split):
            check_task(self.task, self._initial, split)
        layer = self.project.settings.select_layer.layer
        if layer != AUTO:
            find_layer(self._initial, layer)
        watched_modules(self._initial, self.task.watched)

    @cached_property
    def _initial(self) -> nn.Module:
        """The model before training: new, or with the imported weights."""
        model, weights = self.new_model(), data_path(self.project, "weights")
        if weights is not None:
            import_weights(weights, model)
        return model

    def work(self, wip: Path) -> Finished:
        """Import, or train with the task's own trainer or the default one."""
        model = self._initial.to(self.device)
        weights = data_path(self.project, "weights")
        if weights is not None:
            how, epochs = {"imported": weights.name}, {}
        elif not uses_default(self.task, "train_base"):
            how, epochs = self._train_by_task(model), {}
        else:
            how, epochs = self._train(model, wip)
        save_model(wip / BASE_FILE, model)
        summary = {
            **how,
            "parameters": sum(p.numel() for p in model.parameters()),
            "validation": self._figures(model, self.splits["validation"]),
            "test": self._figures(model, self.test_split),
        }
        exhausted = {"train-base.epochs": {"value": self.settings.epochs, "reached": 0, "exhausted": True}}
        return Finished(summary, sha256_file(wip / BASE_FILE), epochs or exhausted)

    def _figures(self, model: nn.Module, split: Split) -> dict[str, float | None]:
        return {name: finite(value) for name, value in evaluate(self.task, model, split, self.device).items()}

    def _train_by_task(self, model: nn.Module) -> dict[str, Any]:
        model.train()
        with user_code("train_base()"), global_seed(self.seed, "train-base"):
            options = self.settings.model_dump()
            self.task.train_base(
                model,
                self.splits["train"],
                self.splits["validation"],
                seed=self.seed,
                device=self.device,
                report=self.report,
                **options,
            )
        return {"trained": "by the task"}

    def _train(self, model: nn.Module, wip: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """The default trainer: epochs are evaluations, patience counts them, every epoch leaves a checkpoint."""
        settings, train = self.settings, self.splits["train"]
        batch = min(settings.batch_size, len(train))
        epoch_steps = max(1, len(train) // batch)

        def step_losses(step: int) -> Iterator[Tensor]:
            rows = batch_rows(len(train), batch, step, self.seed, "train-base")
            x, y = train.batch(rows, self.seed, "train-base", step)
            with global_seed(self.seed, "train-base", step), naming_rows(train, rows):
                loss = losses(self.task, self.forward(model, to_device(x, self.device)), to_device(y, self.device)).mean()
            yield loss

        def score() -> dict[str, float]:
            figures = evaluate(self.task, model, self.splits["validation"], self.device)
            return {"score": figures["loss"], **{f"validation_{name}": value for name, value in figures.items()}}

        def snapshot() -> dict[str, Tensor]:
            return {name: value.clone() for name, value in model.state_dict().items()}

        trainer = Trainer(model, _optimizer(settings, model), step_losses, average=False, clip=False)
        plan = Plan(settings.epochs * epoch_steps, epoch_steps, epoch_steps, settings.patience)
        self.tell_total(plan.max_steps, "steps")
        trained = TrainingRun(wip, self.fingerprint, trainer, score, snapshot, plan, self.report).run()
        model.load_state_dict(load_tensors(trained.snapshot))
        done = {"epochs": trained.steps // epoch_steps, "best_epoch": trained.best["step"] // epoch_steps}
        reached = {"value": settings.epochs, "reached": done["epochs"], "exhausted": trained.stopped_early}
        return done, {"train-base.epochs": reached}

    def extend(self, finished: Path, wip: Path) -> None:
        """Take up the finished training's last checkpoint."""
        take_up_training(finished, wip)


def _optimizer(settings: Any, model: nn.Module) -> torch.optim.Optimizer:
    if settings.optimizer == "adam":
        return torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=0.9, weight_decay=settings.weight_decay)
