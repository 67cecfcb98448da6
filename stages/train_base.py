"""train-base: train the base network, or import its weights; every later stage uses exactly these."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.foundation.errors import SettingsError
from stages.foundation.files import sha256_file
from stages.foundation.numbers import figure
from stages.foundation.progress import Report
from stages.foundation.seeds import global_seed
from stages.foundation.tensors import load_state, load_tensors, save_model, state_tensors
from stages.foundation.trees import to_device
from stages.lifecycle.context import BASE_FILE, GIVE_VALIDATION, PROBABLY_SEEN, RunContext
from stages.lifecycle.results import CommandResult, WorkResult
from stages.lifecycle.stage import Stage
from stages.per_sample.capture import watched_modules
from stages.per_sample.layer import find_layer
from stages.run_directory.format import Extent
from stages.run_directory.pipeline import AUTO
from stages.run_directory.project import Project
from stages.run_directory.sources import data_path
from stages.tasks.checkpoints import import_weights
from stages.tasks.checks import check_task, check_training_output
from stages.tasks.constant import best_constant, is_far_from_unit
from stages.tasks.data import Split
from stages.tasks.loader import losses, naming_rows
from stages.tasks.losses import LOSSES, REGRESSION
from stages.tasks.protocol import uses_default
from stages.tasks.scoring import finite, mean_metrics
from stages.tasks.user_code import user_code, user_faults
from stages.training.plan import Plan
from stages.training.run import TrainingRun, take_up_training
from stages.training.trainer import Trainer, batch_rows

# A loss that is larger than a constant's by less than this share of it is as good.
WORSE_BY = 0.01


def train_base(project: Project, *, force: bool = False, dry_run: bool = False, report: Report | None = None) -> CommandResult:
    """Bring the base up to date.

    Raises:
        OcdError: as `Stage.execute`, and for weights that do not fit, losses that are not finite, and faults of the task.
    """
    return TrainBase(RunContext(project, report)).execute(force=force, dry_run=dry_run)


class TrainBase(Stage):
    """Trains the base, or imports its weights."""

    name = "train-base"

    def plan(self) -> dict[str, Any]:
        size = sum(value.numel() * value.element_size() for value in state_tensors(self.context.new_model()).values())
        if (weights := self._weights) is not None:
            return {"what": f"import {weights.name}", "bytes": size}
        return {"what": f"train {self.settings.epochs} epochs on {len(self.context.splits['train']):,} samples", "bytes": size}

    def check(self) -> None:
        """The weights fit, a batch goes through model and loss, and what later stages need is there: nobody should train for
        hours first."""
        context = self.context
        for split in (context.splits["train"], context.splits["validation"], context.test_split):
            check_task(context.task, self._initial, split)
        if self._weights is None and context.project.settings.task.weights_key:
            raise SettingsError(
                f"task.weights_key = {context.project.settings.task.weights_key!r}, and no weights are named to take it from",
                "name them, too: ocd train-base --weights FILE --weights-key NAME",
            )
        if self._trains:
            check_training_output(context.task, context.new_model().to(context.device), context.splits["train"])
        layer = context.project.settings.select_layer.layer
        if layer != AUTO:
            find_layer(self._initial, layer)
        watched_modules(self._initial, context.task.watched)

    @property
    def _weights(self) -> Path | None:
        """The file to import, if any."""
        return data_path(self.context.project, "weights")

    @cached_property
    def _initial(self) -> nn.Module:
        """The model before training: new, or with the imported weights."""
        model = self.context.new_model()
        if self._weights is not None:
            self._imported = import_weights(self._weights, model, self.context.project.settings.task.weights_key)
        return model

    @property
    def _trains(self) -> bool:
        """Whether the default trainer is at work."""
        return self._weights is None and uses_default(self.context.task, "train_base")

    @cached_property
    def _steps(self) -> tuple[int, int]:
        """Samples to a batch, and steps to an epoch, of the default trainer."""
        count = len(self.context.splits["train"])
        batch = min(self.settings.batch_size, count)
        return batch, max(1, count // batch)

    def begin(self, finished: Path | None) -> None:
        """Take up a finished training's last checkpoint, where there is one."""
        take_up_training(finished, self.unfinished.path)
        if self._trains:
            self.unfinished.tell_total(self.settings.epochs * self._steps[1], "steps")

    def work(self, folder: Path) -> WorkResult:
        """Import, or train with the task's own trainer or the default one."""
        context, model = self.context, self._initial.to(self.context.device)
        extent = Extent(value=self.settings.epochs, reached=0, exhausted=True)
        if self._weights is not None:
            how = self._imported.summary()
            if sentence := self._imported.sentence():
                self.report.message(sentence)
        elif self._trains:
            how, extent = self._train(model, folder)
        else:
            how = self._train_by_task(model)
        save_model(folder / BASE_FILE, model)
        figures = self._figures(model, context.splits["validation"])
        weak = list(self._about_constant(model, figures["loss"]))
        summary = {
            **how,
            "parameters": sum(p.numel() for p in model.parameters()),
            "validation": figures,
            "test": self._figures(model, context.test_split),
            "validation_samples": len(context.splits["validation"]),
            "test_samples": len(context.test_split),
            "worse_than_constant": bool(weak),
            "warnings": [*self._about_training(how, extent), *weak],
        }
        return WorkResult(summary, sha256_file(folder / BASE_FILE), {"train-base.epochs": extent})

    def _figures(self, model: nn.Module, split: Split) -> dict[str, float | None]:
        found = mean_metrics(self.context.task, model, split, self.context.device)
        return {name: finite(value) for name, value in found.items()}

    def _about_training(self, how: dict[str, Any], extent: Extent) -> Iterator[str]:
        """What the end of the training, or the import, leaves open."""
        if how.get("best_epoch", 0) == how.get("epochs") and extent.exhausted:
            yield (
                "still improving, though by less than 1 % an epoch, when patience ended it: a larger train-base.lr, or "
                "train-base.patience=0, takes it further; both with --force"
            )
        elif how.get("best_epoch") == self.settings.epochs:
            last = "the only epoch" if how["epochs"] == 1 else f"the last of {how['epochs']} epochs"
            yield f"still improving: {last} was the best; raise train-base.epochs, training then goes on from there"
        if self._weights is not None and not self.context.validation_is_given:
            yield f"{PROBABLY_SEEN}; {GIVE_VALIDATION}"

    def _about_constant(self, model: nn.Module, loss: float | None) -> Iterator[str]:
        """That the base is worse on validation than an output that is the same for every sample."""
        context, judged = self.context, self.context.splits["validation"]
        constant = best_constant(context.task, model, context.splits["train"], judged, context.seed)
        if loss is None or constant is None or not loss > constant.loss + WORSE_BY * abs(constant.loss):
            return
        if context.task.kind == REGRESSION and constant.targets and is_far_from_unit(*constant.targets):
            mean, deviation = (f"{value:.3g}" for value in constant.targets)
            advice = "scale the targets to mean 0 and standard deviation 1: "
            advice += f"y has mean {mean} and standard deviation {deviation}"
        elif self._weights is not None:
            advice = "see whether these weights are this model's, and the data scaled as those they were trained on"
        else:
            advice = "train longer, or try another learning rate"
        name, samples = context.project.settings.task.loss, f"{len(judged):,} validation sample{'s' * (len(judged) > 1)}"
        yield (
            f"the base is worse than a constant: {name if name in LOSSES else 'loss'} {figure(loss)} on {samples}, where one "
            f"output for all of them has {figure(constant.loss)}; {advice}"
        )

    def _train_by_task(self, model: nn.Module) -> dict[str, Any]:
        context = self.context
        model.train()
        with user_code("train_base()"), global_seed(context.seed, "train-base"):
            context.task.train_base(
                model,
                context.splits["train"],
                context.splits["validation"],
                seed=context.seed,
                device=context.device,
                report=self.report,
                **self.settings.model_dump(),
            )
        return {"trained": "by the task"}

    def _train(self, model: nn.Module, folder: Path) -> tuple[dict[str, Any], Extent]:
        """The default trainer: epochs are evaluations, patience counts them, every epoch leaves a checkpoint."""
        context, settings, (batch, epoch_steps) = self.context, self.settings, self._steps
        train = context.splits["train"]

        def step_losses(step: int) -> Iterator[Tensor]:
            rows = batch_rows(len(train), batch, step, context.seed, "train-base")
            x, y = (to_device(tree, context.device) for tree in train.batch(rows, context.seed, "train-base", step))
            with global_seed(context.seed, "train-base", step), naming_rows(train, rows):
                loss = losses(context.task, context.forward(model, x), y).mean()
            yield loss

        def score() -> dict[str, float]:
            figures = mean_metrics(context.task, model, context.splits["validation"], context.device)
            return {"score": figures["loss"], **{f"validation_{name}": value for name, value in figures.items()}}

        trainer = Trainer(model, _optimizer(settings, model), step_losses, average=False, clip=False)
        plan = Plan(settings.epochs * epoch_steps, epoch_steps, epoch_steps, settings.patience)
        with user_faults("training the model"):
            trained = TrainingRun(folder, self.unfinished.fingerprint, trainer, score, plan, self.report).run()
        load_state(model, load_tensors(trained.snapshot))
        done = {"epochs": trained.steps // epoch_steps, "best_epoch": trained.best["step"] // epoch_steps}
        return done, Extent(value=settings.epochs, reached=done["epochs"], exhausted=trained.stopped_early)


def _optimizer(settings: Any, model: nn.Module) -> torch.optim.Optimizer:
    if settings.optimizer == "adam":
        return torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=0.9, weight_decay=settings.weight_decay)
