"""collect: overfit every training sample and write deltas and I(x), block by block, into the delta store."""

import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from stages.foundation.errors import SettingsError, TaskError
from stages.foundation.files import available_memory, digest, require_space, sweep
from stages.foundation.progress import Report
from stages.foundation.seeds import generator
from stages.foundation.trees import Tree, to_device
from stages.lifecycle.outcome import Finished, Outcome
from stages.lifecycle.sharing import SharedStage
from stages.overfitting.batch_size import auto_batch_size, auto_threads, rows_worth_keeping, sample_bytes
from stages.overfitting.collector import (
    Collector,
    bad_rows,
    check_recipe,
    is_finite,
    make_overfitter,
    not_finite,
    summary_of,
    writers,
)
from stages.overfitting.overfitter import Overfitter
from stages.per_sample.pass_size import forward_operations
from stages.run_directory.locks import Part
from stages.run_directory.project import Project
from stages.store.delta_store import RESULT_ARRAYS, ArraySpec, DeltaStore, block_rows, result_specs
from stages.tasks.conditioning import check_condition, condition
from stages.tasks.data import Split
from stages.tasks.loader import check_task
from stages.tasks.views import any_views

# Samples that self-checks are made on.
PROBE = 4
SMALLER_BLOCKS = "smaller blocks with --set collect.block_samples=N"


def collect(
    project: Project,
    *,
    part: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    report: Report | None = None,
) -> Outcome:
    """Bring the delta store up to date, or one part of it.

    Args:
        part: "i/n", the i-th of n parts of the blocks; the last part to finish makes the store whole.

    Raises:
        OcdError: as `Stage.execute`; too little disk; deltas that are not finite; faults of the task.
    """
    return Collect(project, report, part=part).execute(force=force, dry_run=dry_run)


class Collect(SharedStage):
    """The stage.

    Args:
        project: the project.
        report: hears of its progress.
        part: as `collect`.
    """

    name = "collect"

    def plan(self) -> dict[str, Any]:
        """Samples, blocks and bytes."""
        store, repeats = self._store(Path(), ""), self.settings.repeats
        Part.check(self._part, store.blocks, SMALLER_BLOCKS)
        samples = f"{store.samples // repeats:,} samples{f', {repeats} times each' if repeats > 1 else ''}"
        return {
            "what": f"overfit {self.layer.name} {self.layer.matrix_shape} on {samples}, {store.blocks} blocks",
            "samples": store.samples // repeats,
            "blocks": store.blocks,
            "bytes": store.nbytes,
        }

    def check(self) -> None:
        """A batch goes through model and loss, the loss depends on the layer, the conditioning can be captured, and the
        settings fit one another."""
        check_recipe(self.settings, self.task)
        few = self._tried
        # It looks at the first few rows, and at the labels of all.
        others = [row for row in range(0, len(self.rows), self.settings.repeats) if row not in few]
        check_task(self.task, self.base_to_overfit, self.rows.select(torch.as_tensor([*few, *others])))
        check_condition(self.task, self.base_to_overfit, self.layer, to_device(self.rows.inputs(few), self.device))
        Part.check(self._part, self._store(Path(), "").blocks, SMALLER_BLOCKS)
        self._collector.confirm(few, self.rows.batch(few))
        if self.settings.store == "factored" and self.overfitter.why_dense:
            raise SettingsError(
                f"collect.store = 'factored' needs deltas that are one outer product: {self.overfitter.why_dense}",
                "use --set collect.store=dense",
            )
        found = self._collector.overfit_batch(few, self.rows.batch(few))
        bad = bad_rows({name: value.cpu().numpy() for name, value in found.items()})
        if bad.any() and not self.settings.skip_bad:
            raise not_finite(int(found["sample_index"][int(bad.argmax())]))

    def auto_threads(self) -> int:
        """By the size of a pass, and by what of the work is compressing and writing."""
        specs = self._store(Path(), "").specs
        return auto_threads(
            self._operations, self._batch_size(self._block_rows(specs)), sum(s.row_bytes for s in specs.values())
        )

    def prepare(self, wip: Path) -> None:
        """Settle what all parts share, and lay out the arrays."""
        store = self._store(wip, self.fingerprint)
        execution = self.keep_execution(
            batch_size=self._batch_size(store.rows), block_samples=store.rows, method=self.overfitter.name
        )
        store = self._store(wip, self.fingerprint, execution["block_samples"])
        self.tell_total(store.blocks, "blocks")
        if self._part is None:
            sweep(wip)
        require_space(wip, store.nbytes * (store.blocks - store.records) // store.blocks)
        store.create()
        if self._part is None:
            store.trim()
        self.divide(store)
        if (kept := execution["method"]) != self.overfitter.name:
            self.report.message(f"begun by {kept}, it goes on by {self.overfitter.name}: deltas may differ by rounding")
        if self.settings.block_samples not in ("auto", store.rows):
            self.report.message(f"begun with blocks of {store.rows:,} samples, it goes on with them")

    def work(self, wip: Path) -> Finished | None:
        """Every block (of the part) that is not done, then what makes the store whole; None while others have some to do."""
        execution = self.keep_execution()
        store = self._store(wip, self.fingerprint, execution["block_samples"])
        before = self.look_again(store, "samples")
        left = sum(len(store.block_range(block)) for block in self._pending)
        if self._pending:
            self._tell_method(left)
            self._collector.work(
                store,
                self._pending,
                execution["batch_size"],
                writers(self.settings.writers),
                self.settings.skip_bad,
                lambda done, figures: self.report.progress(before + done, before + left, "samples", **figures),
            )
        return self._finished(store) if self.is_whole(store) else None

    def extend(self, finished: Path, wip: Path) -> None:
        """Keep the whole blocks of a smaller or damaged store."""
        manifest = self.manifest_of(self.name)
        self.keep_execution(**{key: manifest["execution"][key] for key in ("batch_size", "block_samples")})
        self.keep_threads(manifest["made"]["threads"])
        self._store(wip, self.fingerprint, manifest["execution"]["block_samples"]).adopt(finished)

    @cached_property
    def rows(self) -> Split:
        """The rows to overfit, in a seeded order, so that more samples later are the same ones and some; each as often as it is
        overfitted, one after the other."""
        if self.settings.split == "validation" and self.validation_is_given:
            raise SettingsError(
                "collect.split = 'validation': the task has a validation set of its own, not rows of train",
                'use collect.split = "train"',
            )
        split = self.splits[self.settings.split]
        wanted = len(split) if self.settings.samples == "all" else min(self.settings.samples, len(split))
        order = torch.randperm(len(split), generator=generator(self.seed, "collect", "order"))
        return split.select(order[:wanted].repeat_interleave(self.settings.repeats))

    @cached_property
    def overfitter(self) -> Overfitter:
        """How samples are overfitted."""
        return make_overfitter(self.task, self.base_to_overfit, self.layer, self.settings, self._probe)

    @cached_property
    def _collector(self) -> Collector:
        kind = type(self.layer.module(self.base))
        return Collector(self.task, self.overfitter, kind, self.rows, self.device, self.seed, self.settings.repeats)

    @cached_property
    def _tried(self) -> list[int]:
        """The rows that self-checks are made on; where bad samples are left out, some with inputs that are none."""
        repeats = self.settings.repeats
        first = range(0, min(PROBE * repeats, len(self.rows)), repeats)
        if not self.settings.skip_bad:
            return list(first)
        more = range(0, min(8 * PROBE * repeats, len(self.rows)), repeats)
        return [row for row in more if is_finite(self.rows.inputs([row]))][:PROBE] or list(first)

    @cached_property
    def _probe(self) -> tuple[Tree, Tree]:
        return self.rows.batch([self._tried[i % len(self._tried)] for i in range(PROBE)])

    @cached_property
    def _operations(self) -> int:
        return forward_operations(self.base_to_overfit, self.forward, to_device(self._probe[0], self.device))

    @cached_property
    def _sample_bytes(self) -> int:
        x, of_step = (to_device(given[0], self.device) for given in (self._probe, any_views(self.task, *self._probe)))
        given = (self.overfitter, self.layer, self.base_to_overfit, self.forward, x, of_step)
        return sample_bytes(*given, factored=self.settings.store == "factored")

    def _batch_size(self, rows: int) -> int:
        if self.settings.batch_size != "auto" and self.overfitter.name != "loop":
            return self.settings.batch_size
        return auto_batch_size(self.overfitter, self._sample_bytes, min(rows, len(self.rows)), available_memory(), self.device)

    def _tell_method(self, samples: int) -> None:
        """Say which slow method is taken, why, and what it costs."""
        if not self.overfitter.reason:
            return
        each = self._collector.seconds_per_sample(range(min(self._begun["execution"]["batch_size"], samples, 8)))
        method = (
            "the plain loop, one sample at a time"
            if self.overfitter.name == "loop"
            else f"{self.overfitter.name}, not by substitution"
        )
        self.report.message(
            f"{self.layer.name} is overfitted by {method}: {self.overfitter.reason}; "
            f"about {each * 1e3:.3g} ms a sample, {datetime.timedelta(seconds=round(each * samples))} for {samples:,}"
        )

    @cached_property
    def _pooled(self) -> tuple[dict[str, ArraySpec], dict[str, str]]:
        """The conditioning arrays, and how wide fields are made smaller, found on one sample."""
        x = to_device(self.rows.inputs([0]), self.device)
        _, fields, notes = condition(self.task, self.base_to_overfit, self.layer, x)
        if clash := sorted(fields.keys() & set(RESULT_ARRAYS)):
            raise TaskError(
                f"the conditioning has a field named {clash[0]!r}, which the store uses itself", "give it another name"
            )
        return {name: ArraySpec("float32", tuple(value.shape[1:])) for name, value in fields.items()}, notes

    def _store(self, folder: Path, fingerprint: str, rows: int | None = None) -> DeltaStore:
        specs = result_specs(self.layer.matrix_shape, factored=self.settings.store == "factored") | self._pooled[0]
        return DeltaStore(folder, specs, len(self.rows), rows or self._block_rows(specs), fingerprint)

    def _block_rows(self, specs: dict[str, ArraySpec]) -> int:
        if self.settings.block_samples != "auto":
            return self.settings.block_samples
        return block_rows(specs, len(self.rows), rows_worth_keeping(self.overfitter, self._operations))

    def _finished(self, store: DeltaStore) -> Finished:
        description, totals = store.describe(), store.totals()
        more = {"until_converged": self.settings.until_converged, "pooled": self._pooled[1]}
        summary = summary_of(self.layer, store, totals, self.overfitter, self.settings.repeats) | more
        content = digest([description, sorted(totals.hashes.items())])
        samples = store.samples // self.settings.repeats
        exhausted = samples == len(self.splits[self.settings.split])
        reached = {"value": self.settings.samples, "reached": samples, "exhausted": exhausted}
        return Finished(summary, content, {"collect.samples": reached}, {"store": description}, totals.hashes)
