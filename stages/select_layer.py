"""select-layer: score every candidate by the entropy of the loss under perturbation (Eq. 6), and choose one."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.foundation.errors import ComputeError, SettingsError
from stages.foundation.progress import Report
from stages.foundation.seeds import generator, seed_of
from stages.foundation.trees import Tree, take, to_device
from stages.lifecycle.context import RunContext
from stages.lifecycle.results import CommandResult, WorkResult
from stages.lifecycle.stage import Stage
from stages.per_sample.entropy import kde_entropy, perturbed_losses, rank_stability, ranks_of
from stages.per_sample.layer import Layer, candidates, find_layer
from stages.per_sample.self_check import choose
from stages.run_directory.format import Candidate, LayerChoice
from stages.run_directory.pipeline import AUTO, LAYER
from stages.run_directory.project import Project
from stages.tasks.loader import losses

LAYER_FILE = "layer.json"
# Rows of one forward pass: several draws share it, so that small models are not ruled by the cost of a call.
ROWS_AT_ONCE = 512
WEIGHT_BYTES = 64 << 20


def select_layer(
    project: Project, *, force: bool = False, dry_run: bool = False, report: Report | None = None
) -> CommandResult:
    """Bring the choice of the layer up to date.

    Raises:
        OcdError: as `Stage.execute`; a layer that does not exist or is a vector; losses that are not finite.
    """
    return SelectLayer(RunContext(project, report)).execute(force=force, dry_run=dry_run)


class SelectLayer(Stage):
    """Scores every candidate and chooses the layer."""

    name = "select-layer"
    takes_less_memory = "name a layer with --layer NAME, compute on --device cpu, or free memory"

    def plan(self) -> dict[str, Any]:
        """Draws, samples and candidates."""
        found = candidates(self.context.base)
        what = f"{self.settings.draws:,} draws × {self._samples():,} samples × {len(found)} candidates"
        return {"what": what, "bytes": 1000 * len(found)}

    def check(self) -> None:
        """A named layer exists; without one there are draws to score by."""
        if self.settings.layer != AUTO:
            find_layer(self.context.base, self.settings.layer)
        elif self.settings.draws < 2:
            raise SettingsError(
                f"select-layer.draws = {self.settings.draws}: a score needs at least 2 draws",
                "set more draws, or name a layer with --layer",
            )

    def begin(self, finished: Path | None) -> None:
        """There is nothing to lay out."""

    def work(self, folder: Path) -> WorkResult:
        """Score the candidates, rank them, choose, and write `layer.json`."""
        base, wanted = self.context.base, self.settings.layer
        found = candidates(base)
        if self.settings.draws >= 2:
            scored = self._scored(found)
        else:
            scored = [Candidate(name=layer.name, shape=list(layer.shape), score=None) for layer in found]
        name = max(scored, key=lambda candidate: candidate.score).name if wanted == AUTO else wanted
        layer = find_layer(base, name)
        choice = LayerChoice(
            layer=layer.name,
            shape=list(layer.shape),
            chosen_by="score" if wanted == AUTO else "setting",
            candidates=scored,
        )
        choice.write(folder / LAYER_FILE)
        return WorkResult(choice.as_json(), layer.name, chosen={LAYER: layer.name})

    def _samples(self) -> int:
        return min(self.settings.samples, len(self.context.splits["train"]))

    def _batch(self) -> tuple[Tree, Tree]:
        """The same seeded training samples for every candidate."""
        train = self.context.splits["train"]
        picked = torch.randperm(len(train), generator=generator(self.context.seed, "select-layer", "samples"))[
            : self._samples()
        ]
        x, y = train.batch(picked.sort().values)
        return to_device(x, self.context.device), to_device(y, self.context.device)

    def _scored(self, found: list[Layer]) -> list[Candidate]:
        x, y = self._batch()
        entropies, spreads = [], []
        for number, layer in enumerate(found):
            values = self._losses(layer, x, y, number, len(found))
            entropies.append([kde_entropy(column) for column in values.T])
            spreads.append(float(values.std(axis=0).mean()))
        scores = np.array(entropies)
        stability = rank_stability(scores, np.random.default_rng(seed_of(self.context.seed, "select-layer", "resampling")))
        ranks = ranks_of(scores.sum(1))
        return [
            Candidate(
                name=layer.name,
                shape=list(layer.shape),
                score=float(scores[i].sum()),
                loss_spread=spreads[i],
                rank=int(ranks[i]),
                rank_stability=float(stability[i]),
            )
            for i, layer in enumerate(found)
        ]

    def _losses(self, layer: Layer, x: Tree, y: Tree, number: int, count: int) -> np.ndarray:
        """The losses of one candidate's draws, (draws, S)."""
        context = self.context
        run, _ = choose(context.base, layer, context.forward, take(x, slice(0, 2)))
        draws = self.settings.draws
        parts, done = [], 0
        for part in perturbed_losses(
            run,
            layer,
            layer.weight(context.base),
            x,
            y,
            lambda output, labels: losses(context.task, output, labels),
            draws=draws,
            sigma=self.settings.sigma,
            seed=context.seed,
            at_once=max(1, min(ROWS_AT_ONCE // self._samples(), WEIGHT_BYTES // (4 * layer.numel))),
        ):
            parts.append(part)
            done += len(part)
            self.report.progress(number * draws + done, count * draws, "draws")
        values = np.concatenate(parts)
        if not np.isfinite(values).all():
            raise ComputeError(f"the loss is not finite when {layer.name} is perturbed", "take a smaller select-layer.sigma")
        return values
