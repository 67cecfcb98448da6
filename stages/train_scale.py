"""train-scale: train the network that predicts ρ, the norm of the delta (Eq. 10)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.artifacts.files import digest, link_or_copy, require_memory, require_space, sha256_file, write_json
from stages.artifacts.progress import Report
from stages.artifacts.project import Project
from stages.artifacts.run_directory import folder_of
from stages.artifacts.store_reader import StoreReader
from stages.artifacts.training_run import Plan, Trained, TrainingRun, take_up_training
from stages.diffusion.dataset import Rows, usable_split
from stages.diffusion.scale import ScaleNetwork, scale_loss
from stages.diffusion.training import Trainer, batch_rows, threads_for
from stages.outcome import Finished, Outcome
from stages.seeds import global_seed
from stages.stage import Stage

SCALE_FILE, DESCRIPTION_FILE = "scale.safetensors", "scale.json"


def train_scale(project: Project, *, force: bool = False, dry_run: bool = False, report: Report | None = None) -> Outcome:
    """Bring the scale network up to date.

    Raises:
        OcdError: as `Stage.execute`; a store with nothing but degenerate rows; a loss that is not finite.
    """
    return TrainScale(project, report).execute(force=force, dry_run=dry_run)


@torch.no_grad()
def judge_scale(network: ScaleNetwork, rows: Rows, loss: str) -> dict[str, float]:
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
        widths, width = self._widths(store), self.settings.width
        return sum(widths.values()) * (width + 2) + width * (width + 3)

    def work(self, wip: Path) -> Finished:
        """Read ρ and the conditioning, train, keep the best averaged weights."""
        settings = self.settings
        require_space(wip, self.plan()["bytes"])
        reader = StoreReader(folder_of(self.project, "collect").found, self.manifest_of("collect")["store"])
        train, held_out = self._rows(reader)
        widths = self._widths(reader.description)
        with global_seed(self.seed, "train-scale", "network"):
            network = ScaleNetwork(widths, settings.width)
        network.fit(train.fields, train.rho)
        network.to(self.device)
        batch = min(settings.batch_size, len(train))

        def step_loss(step: int) -> Tensor:
            rows = train.take(batch_rows(len(train), batch, step, self.seed, "train-scale").to(self.device))
            return scale_loss(network(rows.fields), rows.rho, settings.loss).mean()

        trainer = Trainer(
            network, torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=0.0, fused=True), step_loss
        )
        plan = Plan(settings.max_steps, settings.evaluate_steps, settings.checkpoint_steps, settings.patience)
        self.tell_total(plan.max_steps, "steps")
        trained = TrainingRun(
            wip,
            self.fingerprint,
            trainer,
            lambda: judge_scale(trainer.averaged, held_out, settings.loss),
            lambda: trainer.averaged.state_dict(),
            plan,
            self.report,
        ).run()
        return self._finished(wip, trained, {"fields": widths, "width": settings.width}, len(train))

    def extend(self, finished: Path, wip: Path) -> None:
        """Take up the finished training's last checkpoint."""
        take_up_training(finished, wip)

    def _widths(self, store: dict[str, Any]) -> dict[str, int]:
        return {name: int(torch.Size(store["arrays"][name]["shape"][1:]).numel()) for name in store["fields"]}

    def _rows(self, reader: StoreReader) -> tuple[Rows, Rows]:
        require_memory(2 * reader.nbytes(reader.field_names()), "the store's conditioning")
        rho = torch.from_numpy(reader.read("rho"))
        train, held_out = usable_split(torch.from_numpy(reader.read("degenerate")), rho, self.settings.held_out, self.seed)
        rows = Rows({name: torch.from_numpy(reader.read(name)) for name in reader.field_names()}, rho)
        return rows.take(train).to(self.device), rows.take(held_out).to(self.device)

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
