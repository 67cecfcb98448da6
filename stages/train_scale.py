"""train-scale: train the network that predicts ρ, the norm of the delta (Eq. 10)."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.diffusion.delta_batch import DeltaBatch
from stages.diffusion.scale import LOG, ScaleNetwork, scale_loss
from stages.foundation.background import read_ahead
from stages.foundation.files import digest, link_or_copy, require_space, sha256_file, write_json
from stages.foundation.progress import Report
from stages.foundation.seeds import global_seed
from stages.lifecycle.outcome import Finished, Outcome
from stages.lifecycle.stage import Stage
from stages.run_directory.folders import folder_of
from stages.run_directory.pipeline import AUTO
from stages.run_directory.project import Project
from stages.store.reader import StoreReader, field_widths
from stages.training.batches import TrainingBatches
from stages.training.run import Plan, Trained, TrainingRun, take_up_training
from stages.training.trainer import Stream, Trainer, threads_for

SCALE_FILE, DESCRIPTION_FILE = "scale.safetensors", "scale.json"
# So many times the loss of always predicting the mean is no bad batch.
LARGEST_LOSS = 100.0


def train_scale(project: Project, *, force: bool = False, dry_run: bool = False, report: Report | None = None) -> Outcome:
    """Bring the scale network up to date.

    Raises:
        OcdError: as `Stage.execute`; a store with nothing but degenerate rows; a loss that is not finite.
    """
    return TrainScale(project, report).execute(force=force, dry_run=dry_run)


@torch.no_grad()
def scale_figures(network: ScaleNetwork, rows: DeltaBatch, loss: str) -> dict[str, float]:
    """Figures of a scale network on held-out samples.

    Returns:
        score: mean loss; correlation: of log ρ̂ with log ρ (0 where either is constant); error: root mean square of
        log ρ̂ − log ρ; constant_error: the same for the training set's mean of log ρ.
    """
    network.eval()
    predicted, true = network(rows.fields).double(), rows.rho.double().log()
    centred = predicted - predicted.mean(), true - true.mean()
    norms = centred[0].norm() * centred[1].norm()
    return {
        "score": float(scale_loss(predicted, rows.rho.double(), loss).mean()),
        "correlation": float((centred[0] * centred[1]).sum() / norms) if norms > 1e-12 else 0.0,
        "error": float((predicted - true).square().mean().sqrt()),
        "constant_error": float((network.mean_log_rho - true).square().mean().sqrt()),
    }


class TrainScale(Stage):
    """The stage."""

    name = "train-scale"

    def auto_threads(self) -> int:
        """By the size of a step."""
        return threads_for(self._size(self.manifest_of("collect")["store"]), self.settings.batch_size)

    def plan(self) -> dict[str, Any]:
        """Steps and samples."""
        store = self.manifest_of("collect")["store"]
        return {
            "what": f"train on {store['samples']:,} samples, at most {self.settings.max_steps:,} steps",
            "bytes": 40 * self._size(store),
        }

    def _size(self, store: dict[str, Any]) -> int:
        widths, width = field_widths(store), self.settings.width
        return sum(widths.values()) * (width + 2) + width * (width + 3)

    def work(self, wip: Path) -> Finished:
        """Read ρ and the conditioning, train, keep the best averaged weights."""
        settings = self.settings
        require_space(wip, self.plan()["bytes"])
        widths = field_widths(self.manifest_of("collect")["store"])
        rows = self._rows()
        held_out, loss = rows.held_out.to(self.device), settings.loss
        with global_seed(self.seed, "train-scale", "network"):
            network = ScaleNetwork(widths, settings.width)
        network.fit(rows.parts(), rows.rho)
        network.to(self.device)
        stream = Stream(lambda step: read_ahead(rows.batches(step)))

        def step_losses(step: int) -> Iterator[Tensor]:
            batch = stream.at(step).to(self.device)
            yield scale_loss(network(batch.fields), batch.rho, loss).mean()

        optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=0.0, fused=True)
        trainer = Trainer(network, optimizer, step_losses)
        constant = scale_loss(network.mean_log_rho.cpu().expand_as(rows.rho), rows.rho, loss).mean()
        plan = self._plan(float(constant))
        self.tell_total(plan.max_steps, "steps")
        trained = TrainingRun(
            wip,
            self.fingerprint,
            trainer,
            lambda: scale_figures(trainer.averaged, held_out, loss),
            lambda: trainer.averaged.state_dict(),
            plan,
            self.report,
            lambda: self._blame(rows, network, stream.last),
        ).run()
        return self._finished(wip, trained, {"fields": widths, "width": settings.width}, rows.count)

    def _plan(self, constant: float) -> Plan:
        """How the training is driven; `constant` is the loss of always predicting the mean."""
        settings = self.settings
        return Plan(
            settings.max_steps,
            settings.evaluate_steps,
            settings.checkpoint_steps,
            settings.patience,
            settings.checkpoint_minutes,
            # The paper's loss is in decibels, whose growth is no explosion yet.
            LARGEST_LOSS * max(1.0, constant) if settings.loss == LOG else math.inf,
            f"try a smaller learning rate: --set {self.name}.lr={settings.lr / 4:g} --force",
        )

    @torch.no_grad()
    def _blame(self, rows: TrainingBatches, network: ScaleNetwork, batch: DeltaBatch) -> str:
        """The samples of a batch whose loss is worst."""
        on = batch.to(self.device)
        return rows.blame(batch.numbers, scale_loss(network(on.fields), on.rho, self.settings.loss).cpu())

    def extend(self, finished: Path, wip: Path) -> None:
        """Take up the finished training's last checkpoint."""
        take_up_training(finished, wip)

    def _rows(self) -> TrainingBatches:
        settings = self.settings
        return TrainingBatches(
            StoreReader(folder_of(self.project, "collect").found, self.manifest_of("collect")["store"]),
            deltas=False,
            held_out=settings.held_out,
            batch_size=settings.batch_size,
            seed=self.seed,
            device=self.device,
            memory=AUTO,
        )

    def _finished(self, wip: Path, trained: Trained, description: dict[str, Any], samples: int) -> Finished:
        link_or_copy(trained.snapshot, wip / SCALE_FILE)
        write_json(wip / DESCRIPTION_FILE, description)
        best = trained.best
        summary = {
            "steps": trained.steps,
            "stopped_early": trained.stopped_early,
            "best_step": best["step"],
            "held_out_loss": best["score"],
            "correlation": best["correlation"],
            "error": best["error"],
            "constant_error": best["constant_error"],
            "beats_constant": best["error"] < best["constant_error"],
            "samples": samples,
        }
        reached = {"value": self.settings.max_steps, "reached": trained.steps, "exhausted": trained.stopped_early}
        content = digest([sha256_file(wip / SCALE_FILE), description])
        return Finished(summary, content, {"train-scale.max_steps": reached})
