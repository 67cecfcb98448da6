"""train-scale: train the network that predicts ρ, the norm of the delta (Eq. 10)."""

import contextlib
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.diffusion.delta_batch import DeltaBatch
from stages.diffusion.neighbour_encoder import NEIGHBOURS
from stages.diffusion.scale import LOG, ScaleNetwork, scale_loss
from stages.foundation.background import read_ahead
from stages.foundation.files import digest, link_or_copy, require_space, sha256_file
from stages.foundation.progress import Report
from stages.foundation.seeds import global_seed
from stages.lifecycle.context import RunContext
from stages.lifecycle.results import CommandResult, WorkResult
from stages.lifecycle.stage import Stage
from stages.prediction.for_training import neighbour_search, store_of
from stages.run_directory.descriptions import ScaleDescription
from stages.run_directory.format import StoreDescription
from stages.run_directory.pipeline import AUTO
from stages.run_directory.project import Project
from stages.store.reader import field_widths
from stages.training.batches import NOTHING, TrainingBatches
from stages.training.encoders import build_scale
from stages.training.plan import Plan, Trained
from stages.training.retrieval import WHERE
from stages.training.run import TrainingRun, take_up_training
from stages.training.store_neighbours import NeighbourSearch
from stages.training.trainer import Stream, Trainer, threads_for

SCALE_FILE, DESCRIPTION_FILE = "scale.safetensors", "scale.json"
# So many times the loss of always predicting the mean is no bad batch.
LARGEST_LOSS = 100.0
# Of two samples every correlation is 1 or −1, and of few it is mostly chance.
FEWEST_CORRELATED = 10


def train_scale(project: Project, *, force: bool = False, dry_run: bool = False, report: Report | None = None) -> CommandResult:
    """Bring the scale network up to date.

    Raises:
        OcdError: as `Stage.execute`; a store with nothing but degenerate rows; a loss that is not finite.
    """
    return TrainScale(RunContext(project, report)).execute(force=force, dry_run=dry_run)


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
    figures = {
        "score": scale_loss(predicted, rows.rho.double(), loss).mean(),
        "correlation": torch.where(norms > 1e-12, (centred[0] * centred[1]).sum() / norms, 0.0),
        "error": (predicted - true).square().mean().sqrt(),
        "constant_error": (network.mean_log_rho.double() - true).square().mean().sqrt(),
    }
    # All at once: a GPU is waited for once.
    return dict(zip(figures, torch.stack(list(figures.values())).tolist(), strict=True))


class TrainScale(Stage):
    """Trains the scale network on the store."""

    name = "train-scale"

    @property
    def _store(self) -> StoreDescription:
        return self.context.manifest_of("collect").store

    def auto_threads(self) -> int:
        """By the size of a step."""
        return threads_for(self._size(), self.settings.batch_size)

    def plan(self) -> dict[str, Any]:
        what = f"train on {self._store.samples:,} samples, at most {self.settings.max_steps:,} steps"
        return {"what": what, "bytes": 40 * self._size()}

    def _size(self) -> int:
        widths, width = field_widths(self._store), self.settings.width
        return sum(widths.values()) * (width + 2) + width * (width + 3)

    def check(self) -> None:
        """Its settings go together as they are."""

    def begin(self, finished: Path | None) -> None:
        """Take up a finished training's last checkpoint, where there is one."""
        require_space(self.unfinished.path, 40 * self._size())
        take_up_training(finished, self.unfinished.path)
        self.unfinished.tell_total(self.settings.max_steps, "steps")

    def work(self, folder: Path) -> WorkResult:
        """Read ρ and the conditioning, train, keep the best averaged weights."""
        context, settings = self.context, self.settings
        batches = self._batches()
        held_out, loss = batches.held_out.to(context.device), settings.loss
        network = self._network(batches)
        stream = Stream(lambda step: read_ahead(self._ready(batches, step)))

        def step_losses(step: int) -> Iterator[Tensor]:
            batch = stream.at(step).to(context.device)
            yield scale_loss(network(batch.fields), batch.rho, loss).mean()

        optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=0.0, fused=True)
        trainer = Trainer(network, optimizer, step_losses)
        constant = float(scale_loss(network.mean_log_rho.cpu().expand_as(batches.rho), batches.rho, loss).mean())
        # The paper's loss is in decibels, whose growth is no explosion yet.
        largest = LARGEST_LOSS * max(1.0, constant) if loss == LOG else math.inf
        run = TrainingRun(
            folder,
            self.unfinished.fingerprint,
            trainer,
            lambda: scale_figures(trainer.averaged, held_out, loss),
            Plan.of(settings, self.name, largest, settings.lr),
            self.report,
            lambda step: self._blame(batches, network, stream.at(step - 1)),
        )
        with contextlib.closing(stream):
            return self._result(folder, run.run(), batches)

    def _ready(self, batches: TrainingBatches, step: int) -> Iterator[DeltaBatch]:
        """The batches from a step on, made in a thread of its own; for a GPU in page-locked memory."""
        on_gpu = self.context.device.type == "cuda"
        yield from (batch.pinned() if on_gpu else batch for batch in batches.batches(step))

    def _network(self, batches: TrainingBatches) -> ScaleNetwork:
        """New, with the statistics of what it learns from."""
        with global_seed(self.context.seed, "train-scale", "network"):
            network = build_scale(self._description)
        network.fit(batches.parts(), batches.rho)
        return network.to(self.context.device)

    @torch.no_grad()
    def _blame(self, batches: TrainingBatches, network: ScaleNetwork, batch: DeltaBatch) -> str:
        """The samples of a batch whose loss is worst."""
        on = batch.to(self.context.device)
        return batches.blame(batch.numbers, scale_loss(network(on.fields), on.rho, self.settings.loss).cpu())

    def _batches(self) -> TrainingBatches:
        context, settings = self.context, self.settings
        return TrainingBatches(
            store_of(context),
            deltas=NOTHING,
            held_out=settings.held_out,
            batch_size=settings.batch_size,
            seed=context.seed,
            device=context.device,
            memory=AUTO,
            neighbours=self._search.found if self._search else None,
        )

    @cached_property
    def _search(self) -> NeighbourSearch | None:
        return neighbour_search(self.context)

    @cached_property
    def _description(self) -> ScaleDescription:
        fields, width = field_widths(self._store), self.settings.width
        if self._search is None:
            return ScaleDescription(fields=fields, width=width)
        encoder = self._search.described[0]
        return ScaleDescription(
            fields=fields | {NEIGHBOURS: math.prod(encoder.shape)}, width=width, encoders={NEIGHBOURS: encoder}
        )

    def _result(self, folder: Path, trained: Trained, batches: TrainingBatches) -> WorkResult:
        description = self._description
        link_or_copy(trained.snapshot, folder / SCALE_FILE)
        description.write(folder / DESCRIPTION_FILE)
        best = trained.best
        summary = {
            "steps": trained.steps,
            "stopped_early": trained.stopped_early,
            "best_step": best["step"],
            "held_out_loss": best["score"],
            "held_out_samples": batches.held_out_samples,
            "correlation": best["correlation"] if batches.held_out_samples >= FEWEST_CORRELATED else None,
            "error": best["error"],
            "constant_error": best["constant_error"],
            "beats_constant": best["error"] < best["constant_error"],
            "samples": batches.count,
        }
        content = digest([sha256_file(folder / SCALE_FILE), description.as_json()])
        extents = {"train-scale.max_steps": trained.extent(self.settings.max_steps)}
        where = {WHERE: self._search.found.known.where} if self._search else {}
        return WorkResult(summary, content, extents, chosen=where)
