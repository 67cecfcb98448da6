"""evaluate: OCD beside the base and what a sceptic would try, on labelled test samples, with intervals and a verdict."""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from stages.evaluation import from_run
from stages.evaluation import rows as row
from stages.evaluation.advice import advice
from stages.evaluation.comparison import compare, fit_variances, seeded_order
from stages.evaluation.fitting import OnValidation, fit_rows
from stages.evaluation.memorisation import memorisation
from stages.evaluation.metrics import LOSS, Gathered
from stages.evaluation.nearest_labels import nearest_labels_row
from stages.evaluation.neighbours import find_neighbours
from stages.evaluation.requested_rows import (
    LeftOut,
    goes_beyond,
    longer_settings,
    requested_rows,
    seed_branches,
    whole_network_row,
)
from stages.evaluation.results import estimate_all, over_seeds, row_records
from stages.evaluation.rows import Row
from stages.evaluation.run_cost import cost
from stages.evaluation.statistics import Estimate
from stages.evaluation.stored_deltas import StoredDeltas
from stages.evaluation.subject import Batch, EvaluatedSamples, Subject
from stages.evaluation.verdict import VERDICT_TAIL, as_json, compared_with, verdict
from stages.foundation.files import digest, read_json, write_json
from stages.foundation.memory import AtOnce
from stages.foundation.progress import Report
from stages.foundation.seeds import seed_of
from stages.foundation.tensors import save_arrays
from stages.lifecycle.context import GIVE_VALIDATION, PROBABLY_SEEN, RunContext
from stages.lifecycle.results import CommandResult, WorkResult
from stages.lifecycle.stage import Stage
from stages.prediction.for_training import store_of
from stages.prediction.predictor import STRENGTH_FILE
from stages.run_directory.folders import folder_of
from stages.run_directory.project import Project, as_flags, set_flags
from stages.tasks.checks import check_task
from stages.tasks.losses import CLASSIFICATION
from stages.training.trainer import threads_for

RESULTS_FILE, SAMPLES_FILE = "results.json", "samples.npz"
# With fewer validation samples a strength would be noise.
FEWEST_VALIDATION = 5
NO_VALIDATION = f"there are not {FEWEST_VALIDATION} validation samples that neither base nor denoiser was trained on"
SEEN = "the base was probably trained on the validation samples"


def evaluate(project: Project, *, force: bool = False, dry_run: bool = False, report: Report | None = None) -> CommandResult:
    """Bring the evaluation up to date; asked with other settings it is made again.

    Raises:
        OcdError: as `Stage.execute`; faults of the task; a stage of a branch that fails.
    """
    return Evaluate(RunContext(project, report)).execute(force=force, dry_run=dry_run)


class Evaluate(Stage):
    """Compares every row on the test samples."""

    name = "evaluate"

    def plan(self) -> dict[str, Any]:
        settings = self.settings
        extra = f", {settings.seeds} seeds" if settings.seeds > 1 else ""
        what = f"{len(self._test.order):,} test samples, {len(settings.strengths)} strengths{extra}"
        return {"what": what, "bytes": 200 * len(self._test.order)}

    def check(self) -> None:
        """Labels of the splits it reads are in range."""
        context = self.context
        for split in (context.test_split, context.splits["validation"]):
            check_task(context.task, context.base, split)

    def auto_threads(self) -> int:
        """By the size of a pass of the denoiser, where most of the time goes."""
        return threads_for(self.context.manifest_of("train-diffusion").summary["parameters"], from_run.LARGEST)

    def begin(self, finished: Path | None) -> None:
        """There is nothing to lay out: branches keep what they have done."""

    def work(self, folder: Path) -> WorkResult:
        """Branches first, then the comparison."""
        others = {
            seed: read_json(folder_of(branch, self.name).path / RESULTS_FILE) for seed, branch in seed_branches(self.context)
        }
        rows, left_out = self._rows()
        rows, on_validation, more = self._fit(rows)
        left_out |= more
        strengths = on_validation.strengths(rows)
        gathered = self._compare(rows, strengths)
        rng = np.random.default_rng(seed_of(self.context.seed, "evaluate", "bootstrap"))
        on_progress = self._progress("resamples", self.settings.resamples)
        found, primary = estimate_all(gathered, self.settings.resamples, rng, on_progress)
        results = {
            **self._verdict({name: metrics[primary] for name, metrics in found.items()}, primary, on_validation.best(rows)),
            "metric": primary,
            "rows": row_records(gathered, found, on_validation, strengths),
            "left_out": [{"name": name, "reason": reason} for name, reason in left_out.items()],
            **self._facts(on_validation),
            "memorisation": self._memorisation(),
            "cost": self._at_once.whole(lambda size: cost(self.context, self.subject.ensemble, size)),
        }
        if others:
            results["seeds"] = over_seeds({self.context.seed: results, **others})
        # For plots and tests of one's own: each row's loss on each test sample, (rows, N).
        of_samples = np.stack([one.values(LOSS) for one in gathered.values()])
        numbers = self.context.test_split.rows[self._test.order].numpy()
        save_arrays(folder / SAMPLES_FILE, {"sample_index": numbers, "row": np.array(list(gathered)), "loss": of_samples})
        write_json(folder / RESULTS_FILE, {"stage": self.name, **results})
        strength = on_validation.record(rows, self.subject.ensemble)
        strength.write(folder / STRENGTH_FILE)
        return WorkResult(results, digest(strength.as_json()))

    def _verdict(self, losses: dict[str, Estimate], metric: str, best: str | None) -> dict[str, Any]:
        """What is said of OCD, from which comparisons, and what to do next; `best` is the row of the lowest validation loss."""
        comparisons = compared_with(losses)
        found = verdict(comparisons, losses, metric, classes=self.context.task.kind == CLASSIFICATION)
        base, settings = self.context.manifest_of("train-base").summary, longer_settings(self.context)
        project = self.context.project
        given = (text for text in project.overrides if text.startswith("train-base.") and text.split("=")[0] not in settings)
        untried = self.subject.generate.vectors and row.PLAIN not in comparisons
        longer = f"ocd train-base{project.flags}{set_flags(given)}{as_flags(settings)} --force"
        return {
            "verdict": found.sentence,
            "outcome": found.outcome,
            "rival": found.rival,
            "samples_to_decide": found.samples,
            "next": advice(
                found,
                best,
                longer=longer,
                flags=project.all_flags,
                weak=base.get("worse_than_constant", False),
                untried=untried,
                by_paper=not goes_beyond(self.context),
            ),
            "best": best,
            "comparisons": as_json(comparisons),
            # Of the rows' own intervals it is 0.95.
            "confidence": 1 - 2 * VERDICT_TAIL,
        }

    # What is compared.

    @cached_property
    def training(self) -> StoredDeltas:
        return StoredDeltas(store_of(self.context))

    @cached_property
    def subject(self) -> Subject:
        context = self.context
        ensemble = context.project.settings.infer.ensemble
        return from_run.with_denoiser(from_run.make_subject(context, context.layer), context, self.training, ensemble)

    @cached_property
    def _class_means(self) -> Tensor | str:
        return from_run.class_means(self.subject, self.training, self._example)

    @property
    def _example(self) -> Batch:
        return Batch(self.subject, self._test, self._test.order[:2])

    @cached_property
    def _at_once(self) -> AtOnce:
        """Samples of a batch; where memory runs out, what was under way begins anew with half as many."""
        size = self.unfinished.keep_execution(batch_size=from_run.samples_at_once(self.context, self.subject))["batch_size"]
        tell = self.report.message
        return AtOnce(size, from_run.FEWEST, lambda left: tell(f"memory ran out: from here on {left} samples at once"))

    @cached_property
    def _test(self) -> EvaluatedSamples:
        most = None if self.settings.samples == "all" else self.settings.samples
        test = self.context.test_split
        return EvaluatedSamples(test, seeded_order(len(test), self.context.seed, "test", most))

    @cached_property
    def _validation(self) -> EvaluatedSamples | None:
        """Validation samples that neither the base nor the denoiser has learned from; None where they are too few."""
        if self.context.validation_is_seen:
            return None
        split = self.context.splits["validation"]
        order = seeded_order(len(split), self.context.seed, "validation")
        order = order[from_run.unseen(self.context, self.training)[order]][: self.settings.validation_samples]
        return EvaluatedSamples(split, order) if len(order) >= FEWEST_VALIDATION else None

    def _rows(self) -> tuple[list[Row], LeftOut]:
        """Every row that applies, in the table's order, and the others with the reason."""
        subject, training = self.subject, self.training
        # First, while no deltas are kept in memory: a training needs much of it.
        requested, without = requested_rows(self.context, subject)
        # Stages of branches have had their names shown meanwhile.
        self.report.start(self.name)
        self._test, missing = self._with_neighbours(self._test)
        if self._validation is not None:
            self._validation, more = self._with_neighbours(self._validation)
            missing |= more
        rows = row.base_and_oracle() + row.generated_rows(training.mean_rho)
        made, left_out = from_run.training_rows(subject, training, self._class_means, missing)
        rows += made
        labels = nearest_labels_row(training, self.context.splits["all"], self._example, missing)
        if isinstance(labels, str):
            left_out[row.NEAREST_LABELS] = labels
        else:
            rows.append(labels)
        whole = whole_network_row(self.context, len(self._test.order))
        if isinstance(whole, str):
            left_out[row.ORACLE_ALL] = whole
        else:
            rows.append(whole)
        rows += [*requested, *from_run.extra_rows(self.context, {one.name for one in rows})]
        return row.in_order(rows), left_out | without

    def _with_neighbours(self, evaluated: EvaluatedSamples) -> tuple[EvaluatedSamples, dict[str, str]]:
        """The samples with their nearest training samples; and what these cannot be found in, with the reason."""
        training, whole, k = self.training, self.context.splits["all"], self.settings.neighbours
        on_progress = self._progress("neighbours", len(training))
        found, missing = self._at_once.whole(
            lambda size: find_neighbours(self.subject, training, evaluated, whole, k, size, on_progress)
        )
        return dataclasses.replace(evaluated, neighbours=found), missing

    def _fit(self, rows: list[Row]) -> tuple[list[Row], OnValidation, LeftOut]:
        """Fit strengths and a temperature on validation samples: rows that need them come or go."""
        classification, validation = self.context.task.kind == CLASSIFICATION, self._validation
        asked = self.context.project.settings.infer.strength
        left_out = {} if classification else {row.TEMPERATURE: "the task has no classes"}
        if validation is None:
            reason = SEEN if self.context.validation_is_seen else NO_VALIDATION
            left_out = {row.VALIDATED: reason, row.TEMPERATURE: reason} | left_out
            return [one for one in rows if one.name != row.VALIDATED], OnValidation(asked), left_out
        kind = {"classification": classification, "at_once": self._at_once, "progress": self._progress}
        found, on_validation = fit_rows(self.subject, validation, rows, self.settings.strengths, asked, **kind)
        if classification and on_validation.temperature is None:
            left_out[row.TEMPERATURE] = "outputs and labels are not logits and class numbers"
        return found, on_validation, left_out

    def _compare(self, rows: list[Row], strengths: dict[str, float]) -> dict[str, Gathered]:
        """Every row on the test samples."""
        subject, whole, variances = self.subject, self._at_once.whole, {}
        if (validation := self._validation) is not None:
            noted = self._progress("validation samples × rows", len(validation.order) * len(rows))
            variances = whole(lambda size: fit_variances(subject, validation, rows, strengths, size, noted))
        on_progress = self._progress("test samples × rows", len(self._test.order) * len(rows))
        return whole(lambda size: compare(subject, self._test, rows, strengths, variances, size, on_progress))

    def _progress(self, unit: str, total: int) -> Callable[[int], None]:
        return lambda done: self.report.progress(done, total, unit)

    # What is told beside the rows.

    def _facts(self, on_validation: OnValidation) -> dict[str, Any]:
        """What the figures were made with, and what to mind about them."""
        # Of the base, but for what is said of these samples below.
        about_base = self.context.manifest_of("train-base").summary.get("warnings", [])
        warnings = [f"train-base: {text}" for text in about_base if PROBABLY_SEEN not in text]
        if self.context.validation_is_seen:
            warnings.append(f"{PROBABLY_SEEN}: no strength and no temperature is fitted; {GIVE_VALIDATION}")
        if at_the_edge := on_validation.at_the_edge():
            largest = f"{max(self.settings.strengths):g}"
            warnings.append(
                f"the largest strength tried, {largest}, is the best for {', '.join(at_the_edge)}; a larger one may be better: "
                "name more with evaluate.strengths"
            )
        return {
            "samples": len(self._test.order),
            "validation_samples": on_validation.samples,
            "ensemble": self.subject.ensemble,
            "temperature": on_validation.temperature,
            "seed": self.context.seed,
            "warnings": warnings,
        }

    def _memorisation(self) -> dict[str, Any]:
        count, means = self.settings.memorisation_samples, self._class_means
        class_means = None if isinstance(means, str) else means
        return self._at_once.whole(lambda size: memorisation(self.subject, self.training, self._test, size, count, class_means))
