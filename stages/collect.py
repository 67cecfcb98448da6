"""collect: overfit every training sample and write deltas and I(x), block by block, into the delta store."""

import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stages.foundation.errors import SettingsError, TaskError
from stages.foundation.files import available_memory, digest, require_space, sweep
from stages.foundation.progress import Report
from stages.foundation.seeds import generator
from stages.foundation.trees import Tree, to_device
from stages.lifecycle.context import RunContext
from stages.lifecycle.results import CommandResult, WorkResult
from stages.lifecycle.sharing import BlockShare
from stages.lifecycle.stage import Stage
from stages.overfitting.batch_size import auto_batch_size, auto_threads, blocks_together, rows_worth_keeping, sample_bytes
from stages.overfitting.collector import Collector, is_finite, make_overfitter, summary_of, writers
from stages.overfitting.filling import bad_rows, not_finite
from stages.overfitting.overfitter import Overfitter
from stages.overfitting.recipe import check_recipe
from stages.per_sample.pass_size import forward_operations
from stages.run_directory.format import Extent
from stages.run_directory.locks import Part
from stages.run_directory.pipeline import AUTO
from stages.run_directory.project import Project
from stages.store.delta_store import RESULT_ARRAYS, ArraySpec, DeltaStore, block_rows, result_specs
from stages.tasks.checks import check_task
from stages.tasks.conditioning import check_condition, condition
from stages.tasks.data import Split
from stages.tasks.views import any_views

STORE_SETTING, DENSE, FACTORED = "collect.store", "dense", "factored"
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
) -> CommandResult:
    """Bring the delta store up to date, or one part of it.

    Args:
        part: "i/n", the i-th of n parts of the blocks; the last part to finish makes the store whole.

    Raises:
        OcdError: as `Stage.execute`; too little disk; deltas that are not finite; faults of the task.
    """
    return Collect(RunContext(project, report), part).execute(force=force, dry_run=dry_run)


class Collect(Stage):
    """Overfits the samples of a split and fills the delta store."""

    name = "collect"

    def plan(self) -> dict[str, Any]:
        """Samples, blocks and bytes."""
        store, repeats, layer = self.store(Path(), ""), self.settings.repeats, self.context.layer
        Part.check(self.part, store.blocks, SMALLER_BLOCKS)
        samples = f"{store.samples // repeats:,} samples{f', {repeats} times each' if repeats > 1 else ''}"
        return {
            "what": f"overfit {layer.name} {layer.matrix_shape} on {samples}, {store.blocks} blocks",
            "samples": store.samples // repeats,
            "blocks": store.blocks,
            "bytes": store.nbytes,
        }

    def check(self) -> None:
        """A batch goes through model and loss, the loss depends on the layer, the conditioning can be captured, and the
        settings fit one another."""
        context, rows, tried = self.context, self.rows, self._tried
        check_recipe(self.settings, context.task)
        # It looks at the first few rows, and at the labels of all.
        others = [row for row in range(0, len(rows), self.settings.repeats) if row not in tried]
        check_task(context.task, self._base, rows.select(torch.as_tensor([*tried, *others])))
        check_condition(context.task, self._base, context.layer, to_device(rows.inputs(tried), context.device))
        Part.check(self.part, self.store(Path(), "").blocks, SMALLER_BLOCKS)
        self.collector.confirm(tried, rows.batch(tried))
        if self.settings.store == FACTORED:
            self._require_factors()
        found = self.collector.overfit_batch(tried, rows.batch(tried))
        bad = bad_rows({name: value.cpu().numpy() for name, value in found.items()})
        if bad.any() and not self.settings.skip_bad:
            raise not_finite(int(found["sample_index"][int(bad.argmax())]))

    def resolved(self) -> dict[str, Any]:
        return {STORE_SETTING: FACTORED if self.overfitter.one_product else DENSE}

    @property
    def _factored(self) -> bool:
        """Whether the store has factors: as the work was begun, or as it would be where there is none."""
        work = getattr(self, "unfinished", None)
        identity = work.begun.identity if work else self._state(force=False).identity
        asked = identity.settings[STORE_SETTING] if identity else self.settings.store
        return self.overfitter.one_product if asked == AUTO else asked == FACTORED

    def _require_factors(self) -> None:
        if not self.overfitter.one_product:
            raise SettingsError(
                f"collect.store = 'factored' needs deltas that are one outer product: {self.overfitter.why_dense}",
                "use --set collect.store=dense" + (" --force" if self.settings.store == AUTO else ""),
            )

    def auto_threads(self) -> int:
        """By the size of a pass, and by what of the work is compressing and writing."""
        specs = self.store(Path(), "").specs
        row_bytes = sum(spec.row_bytes for spec in specs.values())
        return auto_threads(self._operations, self.batch_size(self._block_rows(specs)), row_bytes)

    def begin(self, finished: Path | None) -> None:
        """Settle what all parts share, lay out the arrays, and keep the whole blocks of a smaller or damaged store."""
        work = self.unfinished
        if self._factored:
            self._require_factors()
        self.overfitter.gives_factors(self._factored)
        if finished is not None:
            manifest = self.context.manifest_of(self.name)
            work.keep_execution(**{key: manifest.execution[key] for key in ("batch_size", "block_samples")})
            work.keep_threads(manifest.made.threads)
            self.store(work.path, work.fingerprint, manifest.execution["block_samples"]).adopt(finished)
        rows = self.store(work.path, work.fingerprint).rows
        kept = work.keep_execution(batch_size=self.batch_size(rows), block_samples=rows, method=self.overfitter.name)
        store = self.store(work.path, work.fingerprint, kept["block_samples"])
        work.tell_total(store.blocks, "blocks")
        if self.part is None:
            sweep(work.path)
        require_space(work.path, store.nbytes * (store.blocks - store.records) // store.blocks)
        store.create()
        if self.part is None:
            store.trim()
        self._share = BlockShare(store, self._holding)
        if kept["method"] != self.overfitter.name:
            self.report.message(
                f"begun by {kept['method']}, it goes on by {self.overfitter.name}: deltas may differ by rounding"
            )
        if self.settings.block_samples not in ("auto", store.rows):
            self.report.message(f"begun with blocks of {store.rows:,} samples, it goes on with them")

    def work(self, folder: Path) -> WorkResult | None:
        """Every block (of the part) that is not done, then what makes the store whole; None while others have some to do."""
        execution, share = self.unfinished.execution, self._share
        store = self.store(folder, self.unfinished.fingerprint, execution["block_samples"])
        before, left = share.look_again(self.report, "samples"), share.rows_left
        if share.pending:
            self._tell_method(left)
            self.collector.work(
                store,
                share.pending,
                execution["batch_size"],
                writers(self.settings.writers, self.context.device.type),
                self.settings.skip_bad,
                lambda done, figures: self.report.progress(before + done, before + left, "samples", **figures),
                self._go_on_smaller,
            )
        return self._result(store) if share.is_whole() else None

    def _go_on_smaller(self, batch: int) -> None:
        """Memory ran out: say so, and keep the size for whoever continues; not of a part, for others may have larger GPUs."""
        self.report.message(f"the GPU's memory ran out: it goes on in batches of {batch:,}")
        if self.part is None:
            self.unfinished.change_execution(batch_size=batch)

    @cached_property
    def rows(self) -> Split:
        """The rows to overfit, in a seeded order, so that more samples later are the same ones and some; each as often as it is
        overfitted, one after the other."""
        context, settings = self.context, self.settings
        if settings.split == "validation" and context.validation_is_given:
            raise SettingsError(
                "collect.split = 'validation': the task has a validation set of its own, not rows of train",
                'use collect.split = "train"',
            )
        split = context.splits[settings.split]
        wanted = len(split) if settings.samples == "all" else min(settings.samples, len(split))
        order = torch.randperm(len(split), generator=generator(context.seed, "collect", "order"))
        return split.select(order[:wanted].repeat_interleave(settings.repeats))

    @property
    def _base(self) -> nn.Module:
        return self.context.base_to_overfit()

    @cached_property
    def overfitter(self) -> Overfitter:
        """How samples are overfitted."""
        return make_overfitter(self.context.task, self._base, self.context.layer, self.settings, self._probe)

    @cached_property
    def collector(self) -> Collector:
        """Overfits and writes them."""
        context = self.context
        kind = type(context.layer.module(self._base))
        return Collector(context.task, self.overfitter, kind, self.rows, context.device, context.seed, self.settings.repeats)

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
        return forward_operations(self._base, self.context.forward, to_device(self._probe[0], self.context.device))

    @cached_property
    def _sample_bytes(self) -> int:
        shown = any_views(self.context.task, *self._probe)
        x, of_step = (to_device(given[0], self.context.device) for given in (self._probe, shown))
        return sample_bytes(self.overfitter, x, of_step, factored=self._factored)

    def batch_size(self, rows: int) -> int:
        """Samples overfitted at once, of blocks of so many rows."""
        if self.settings.batch_size != "auto" and self.overfitter.name != "loop":
            return self.settings.batch_size
        rows, device = min(rows, len(self.rows)), self.context.device
        blocks = blocks_together(-(-len(self.rows) // rows), rows, self._probe[0])
        return auto_batch_size(self.overfitter, self._sample_bytes, rows, available_memory(), device, blocks)

    def _tell_method(self, samples: int) -> None:
        """Say which slow method is taken, why, and what it costs."""
        if not self.overfitter.reason:
            return
        each = self.collector.seconds_per_sample(range(min(self.unfinished.execution["batch_size"], samples, 8)))
        name = self.overfitter.name
        method = "the plain loop, one sample at a time" if name == "loop" else f"{name}, not by substitution"
        self.report.message(
            f"{self.context.layer.name} is overfitted by {method}: {self.overfitter.reason}; "
            f"about {each * 1e3:.3g} ms a sample, {datetime.timedelta(seconds=round(each * samples))} for {samples:,}"
        )

    @cached_property
    def _pooled(self) -> tuple[dict[str, ArraySpec], dict[str, str]]:
        """The conditioning arrays, and how wide fields are made smaller, found on one sample."""
        x = to_device(self.rows.inputs([0]), self.context.device)
        _, fields, notes = condition(self.context.task, self._base, self.context.layer, x)
        if clash := sorted(fields.keys() & set(RESULT_ARRAYS)):
            raise TaskError(
                f"the conditioning has a field named {clash[0]!r}, which the store uses itself", "give it another name"
            )
        return {name: ArraySpec("float32", tuple(value.shape[1:])) for name, value in fields.items()}, notes

    def store(self, folder: Path, fingerprint: str, rows: int | None = None) -> DeltaStore:
        """The store in a folder, `rows` to a block; by default as the settings have it."""
        specs = result_specs(self.context.layer.matrix_shape, factored=self._factored) | self._pooled[0]
        return DeltaStore(folder, specs, len(self.rows), rows or self._block_rows(specs), fingerprint)

    def _block_rows(self, specs: dict[str, ArraySpec]) -> int:
        if self.settings.block_samples != "auto":
            return self.settings.block_samples
        return block_rows(specs, len(self.rows), rows_worth_keeping(self.overfitter, self._operations))

    def _result(self, store: DeltaStore) -> WorkResult:
        settings, description, totals = self.settings, store.describe(), store.totals()
        more = {"split": settings.split, "until_converged": settings.until_converged, "pooled": self._pooled[1]}
        summary = summary_of(self.context.layer, store, totals, self.overfitter, settings.repeats) | more
        content = digest([description.as_json(), sorted(totals.hashes.items())])
        samples = store.samples // settings.repeats
        exhausted = samples == len(self.context.splits[settings.split])
        extent = Extent(value=settings.samples, reached=samples, exhausted=exhausted)
        return WorkResult(summary, content, {"collect.samples": extent}, totals.hashes, description)
