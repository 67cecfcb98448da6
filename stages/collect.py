"""collect: overfit every training sample and write deltas and I(x), block by block, into the delta store."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.artifacts.delta_store import RESULT_ARRAYS, ArraySpec, DeltaStore, StoreReader, block_rows, result_specs
from stages.artifacts.files import digest, read_json, require_space
from stages.artifacts.progress import Report
from stages.artifacts.project import Project
from stages.errors import SettingsError, TaskError
from stages.outcome import Finished, Outcome
from stages.seeds import generator
from stages.stage import Stage
from stages.tasks.conditioning import check_condition, condition
from stages.tasks.data import Split
from stages.tasks.loader import check_task, losses
from stages.tasks.protocol import Task
from stages.tasks.user_code import user_code
from stages.trees import Tree, take, to_device
from stages.weights.overfit import Overfit, check_finite, overfit
from stages.weights.per_sample import PerSampleWeights, choose

# Batches that fit the cache beat larger ones.
AUTO_BATCH = 128


def collect(project: Project, *, force: bool = False, dry_run: bool = False, report: Report | None = None) -> Outcome:
    """Bring the delta store up to date.

    Raises:
        OcdError: as `Stage.execute`; too little disk; deltas that are not finite; faults of the task.
    """
    return Collect(project, report).execute(force=force, dry_run=dry_run)


class Collect(Stage):
    """The stage."""

    name = "collect"

    def plan(self) -> dict[str, Any]:
        """Samples, blocks and bytes."""
        store = self._store(Path(), "")
        size = store.samples * sum(spec.row_bytes for spec in store.specs.values())
        return {
            "what": f"overfit {self.layer.name} {self.layer.matrix_shape} on {store.samples:,} samples, {store.blocks} blocks",
            "samples": store.samples,
            "blocks": store.blocks,
            "bytes": size,
        }

    def check(self) -> None:
        """A batch goes through model and loss, the loss depends on the layer, and the conditioning can be captured."""
        check_task(self.task, self.base, self.rows)
        two = self.rows.inputs(range(min(2, len(self.rows))))
        check_condition(self.task, self.base, self.layer, to_device(two, self.device))
        self._overfit_batch(range(min(2, len(self.rows))), self._engine()[0])

    def work(self, wip: Path) -> Finished:
        """Every block that is not done, then the checks that make the store whole."""
        run, reason = self._engine()
        store = self._store(wip, self.fingerprint)
        execution = self.keep_execution(batch_size=self._batch_size(store.rows), block_samples=store.rows, engine=run.name)
        store = self._store(wip, self.fingerprint, execution["block_samples"])
        self.tell_total(store.blocks, "blocks")
        require_space(
            wip,
            store.samples * sum(spec.row_bytes for spec in store.specs.values()) * len(store.pending()) // store.blocks,
        )
        store.create()
        if reason:
            self.report.message(f"{self.layer.name} is overfitted by the plain loop, one sample at a time: {reason}")
        pending = store.pending()
        done = store.samples - sum(len(store.block_range(block)) for block in pending)
        for block in pending:
            self._work_block(store, block, run, execution["batch_size"], done)
            done += len(store.block_range(block))
        store.check_complete()
        return self._finished(store, run, reason)

    def extend(self, finished: Path, wip: Path) -> None:
        """Keep the whole blocks of a smaller store."""
        manifest = self.manifest_of(self.name)
        self.keep_execution(**{key: manifest["execution"][key] for key in ("batch_size", "block_samples")})
        self._store(wip, self.fingerprint, manifest["execution"]["block_samples"]).adopt(finished)

    @cached_property
    def rows(self) -> Split:
        """The rows to overfit, in a seeded order, so that more samples later are the same ones and some."""
        if self.settings.split == "validation" and self.validation_is_given:
            raise SettingsError(
                "collect.split = 'validation': the task has a validation set of its own, not rows of train",
                'use collect.split = "train"',
            )
        split = self.splits[self.settings.split]
        wanted = len(split) if self.settings.samples == "all" else min(self.settings.samples, len(split))
        order = torch.randperm(len(split), generator=generator(self.seed, "collect", "order"))
        return split.select(order[:wanted])

    def _engine(self) -> tuple[PerSampleWeights, str]:
        x, _ = self.rows.batch(range(min(2, len(self.rows))))
        return choose(self.base, self.layer, self.forward, to_device(x, self.device))

    def _batch_size(self, rows: int) -> int:
        """Batches of equal size, about 128, that fill a block."""
        if self.settings.batch_size != "auto":
            return self.settings.batch_size
        rows = min(rows, len(self.rows))
        return -(-rows // -(-rows // AUTO_BATCH))

    @cached_property
    def _pooled(self) -> tuple[dict[str, ArraySpec], dict[str, str]]:
        """The conditioning arrays, and how wide fields are made smaller, found on one sample."""
        x, _ = self.rows.batch([0])
        _, fields, notes = condition(self.task, self.base, self.layer, to_device(x, self.device))
        if clash := sorted(fields.keys() & set(RESULT_ARRAYS)):
            raise TaskError(
                f"conditioning() gave a field named {clash[0]!r}, which the store uses itself", "give it another name"
            )
        return {name: ArraySpec("float32", tuple(value.shape[1:])) for name, value in fields.items()}, notes

    def _store(self, folder: Path, fingerprint: str, rows: int | None = None) -> DeltaStore:
        specs = result_specs(self.layer.matrix_shape) | self._pooled[0]
        chosen = rows or (block_rows(specs) if self.settings.block_samples == "auto" else self.settings.block_samples)
        return DeltaStore(folder, specs, len(self.rows), chosen, fingerprint)

    def _work_block(self, store: DeltaStore, block: int, run: PerSampleWeights, batch: int, done: int) -> None:
        span = store.block_range(block)
        parts: list[dict[str, np.ndarray]] = []
        for start in range(span.start, span.stop, batch):
            positions = range(start, min(span.stop, start + batch))
            parts.append(self._overfit_batch(positions, run))
            losses_now = {
                "base_loss": float(parts[-1]["base_loss"].mean()),
                "overfit_loss": float(parts[-1]["overfit_loss"].mean()),
            }
            self.report.progress(done + positions.stop - span.start, store.samples, "samples", **losses_now)
        store.write_block(block, {name: np.concatenate([part[name] for part in parts]) for name in store.specs})

    def _overfit_batch(self, positions: range, run: PerSampleWeights) -> dict[str, np.ndarray]:
        """Overfit some rows and capture their conditioning: array name to (B, …)."""
        given = self.rows.batch(positions)
        numbers = self.rows.rows[torch.as_tensor(positions)]
        x, y = (to_device(tree, self.device) for tree in given)
        _, fields, _ = condition(self.task, self.base, self.layer, x)
        found = overfit(
            run,
            self.layer.weight(self.base),
            lambda step: self._views(*given, numbers, step) if self._has_views else (x, y),
            x,
            y,
            lambda output, labels: losses(self.task, output, labels),
            optimizer=self.settings.optimizer,
            lr=self.settings.lr,
            steps=self.settings.steps,
        )
        check_finite(found, numbers)
        return _arrays(found, numbers, fields)

    @property
    def _has_views(self) -> bool:
        return type(self.task).view is not Task.view

    def _views(self, x: Tree, y: Tree, numbers: Tensor, step: int) -> tuple[Tree, Tree]:
        """What each sample shows of itself at a gradient step. The task cuts it out on the CPU, where its generator lives."""
        parts = []
        for i, row in enumerate(numbers.tolist()):
            with user_code("view()"):
                parts.append(self.task.view(take(x, i), take(y, i), generator(self.seed, "collect", row, step)))
        split = Split(parts, name="view()")
        return tuple(to_device(tree, self.device) for tree in split.batch(range(len(parts))))

    def _finished(self, store: DeltaStore, run: PerSampleWeights, reason: str) -> Finished:
        description = store.describe()
        reader = StoreReader(store.folder, description)
        degenerate = reader.read("degenerate")
        rho = reader.read("rho")
        summary = {
            "layer": self.layer.name,
            "shape": list(self.layer.matrix_shape),
            "samples": store.samples,
            "blocks": store.blocks,
            "degenerate": int(degenerate.sum()),
            "base_loss": float(reader.read("base_loss").astype(np.float64).mean()),
            "overfit_loss": float(reader.read("overfit_loss").astype(np.float64).mean()),
            "rho": float(rho.astype(np.float64).mean()),
            "engine": run.name,
            "engine_reason": reason,
            "pooled": self._pooled[1],
        }
        chunks = [read_json(store.record_path(block))["chunks"] for block in range(store.blocks)]
        content = digest([description, [sorted((name, entry["sha256"]) for name, entry in chunk.items()) for chunk in chunks]])
        available = len(self.splits[self.settings.split])
        extents = {
            "collect.samples": {
                "value": self.settings.samples,
                "reached": store.samples,
                "exhausted": store.samples == available,
            }
        }
        return Finished(summary, content, extents, {"store": description})


def _arrays(found: Overfit, numbers: Tensor, fields: dict[str, Tensor]) -> dict[str, np.ndarray]:
    tensors = {
        "delta": found.delta,
        "rho": found.rho,
        "degenerate": found.degenerate,
        "base_loss": found.base_loss,
        "overfit_loss": found.overfit_loss,
        "steps": found.steps,
        "sample_index": numbers,
        **fields,
    }
    return {name: value.detach().cpu().numpy() for name, value in tensors.items()}
