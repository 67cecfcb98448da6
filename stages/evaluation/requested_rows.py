"""Rows of `evaluate` that are made on request: most take a training, in a further run that reuses finished stages of this."""

import shlex
import time
from collections.abc import Iterable
from typing import Any

import torch

from stages.evaluation import rows as row
from stages.evaluation.from_run import make_subject, with_denoiser
from stages.evaluation.plain_network import plain_network_row
from stages.evaluation.rows import Members, Row, elsewhere_row, output_row
from stages.evaluation.run_cost import stage_seconds
from stages.evaluation.subject import Batch, Subject
from stages.foundation.errors import ComputeError, SettingsError, TaskError
from stages.foundation.trees import Tree, concatenate, take, to_device, tree_map
from stages.lifecycle.branches import branch_of, bring_up
from stages.lifecycle.context import BASE_FILE, RunContext
from stages.overfitting.recipe import recipe_of
from stages.overfitting.whole_network import overfit_whole
from stages.per_sample.single_precision import HALF
from stages.run_directory.folders import folder_of
from stages.run_directory.pipeline import LEARNED, ORDER
from stages.run_directory.project import Project
from stages.tasks.loader import losses

# Overfitting all layers goes sample by sample: what would take longer has to be asked for.
LONGEST_S = 180.0
TRIED = 3
# Training the base for as long again is cheap below so much, however fast the other stages were.
CHEAP_S = 60.0
TRAINED = (row.ALTERNATIVE, row.REGRESSION_ROW, row.WITH_X, row.BY_PAPER, row.PLAIN, row.LONGER, row.DEEP)
OWN_WAY = "the run's own denoiser is trained by it"
# Bases of a deep ensemble, the run's own among them.
ENSEMBLE_OF = 5

LeftOut = dict[str, str]


def requested_rows(context: RunContext, subject: Subject) -> tuple[list[Row], LeftOut]:
    """The rows that need a training, as `[evaluate] rows` asks for them, and the longer base where it costs less than OCD did;
    and those left out, with the reason.

    Raises:
        ArtifactError, TryAgainError: a stage of a branch fails; it goes on where it was when asked for again.
    """
    asked, found, left_out = set(context.project.settings.evaluate.rows), [], {}
    too_long = _longer_takes_too_long(context)
    asked |= {row.LONGER} if too_long is None else set()

    def why_not(name: str) -> str:
        if name == row.BY_PAPER and not goes_beyond(context):
            return OWN_WAY
        why = too_long if name == row.LONGER else "not asked for: it takes a training"
        return f"{why}; ask with --add {shlex.quote(name)}"

    for name in TRAINED:
        try:
            made = requested_row(context, subject, name) if name in asked else why_not(name)
        except (SettingsError, TaskError, ComputeError) as error:
            # That another layer or network will not do is no fault of the run.
            made = error.message.splitlines()[0]
        if isinstance(made, str):
            left_out[name] = made
        else:
            found.append(made)
    return found, left_out


def requested_row(context: RunContext, subject: Subject, name: str) -> Row | str:
    """One of the rows in `TRAINED`, or why there is none.

    Raises:
        OcdError: as `requested_rows`; a layer or a network that will not do.
    """
    makers = {
        row.ALTERNATIVE: _alternative,
        row.REGRESSION_ROW: _regression,
        row.WITH_X: _with_x,
        row.BY_PAPER: _by_paper,
        row.PLAIN: plain_network_row,
        row.LONGER: _longer,
        row.DEEP: _deep_ensemble,
    }
    return makers[name](context, subject)


def _branch(context: RunContext, name: str, values: dict[str, Any], stages: Iterable[str]) -> RunContext:
    """Another run of the same task with some settings changed, brought up to date."""
    project = branch_of(context.project, name, values)
    changed = ", ".join(f"{key} = {value}" for key, value in values.items())
    context.report.message(f"{name}: {changed}, in {project.run_path}")
    bring_up(context.project, project, stages, context.report)
    return RunContext(project, context.report)


def _alternative(context: RunContext, subject: Subject) -> Row | str:
    """OCD on the layer with the second highest score; on that with the highest, where the second is the one chosen."""
    candidates = context.manifest_of("select-layer").summary["candidates"]
    scored = sorted((c for c in candidates if c["score"] is not None), key=lambda c: -c["score"])
    others = [c["name"] for c in scored[:2] if c["name"] != subject.layer.name]
    if not others:
        return "select-layer has no scores of other layers"
    values = {"select-layer.layer": others[-1], "select-layer.draws": 0}
    branch = _branch(context, "alternative-layer", values, LEARNED)
    other = with_denoiser(make_subject(branch, branch.layer), branch, None, subject.ensemble)
    return elsewhere_row(row.ALTERNATIVE, other)


def _regression(context: RunContext, subject: Subject) -> Row:
    """The same network regressing the unit delta from the conditioning (Eq. 1)."""
    branch = _branch(context, "deterministic-hypernetwork", {"train-diffusion.prediction": "mean"}, LEARNED)
    return elsewhere_row(row.REGRESSION_ROW, with_denoiser(subject, branch, None, 1))


def _with_x(context: RunContext, subject: Subject) -> Row | str:
    """OCD whose networks see x beside the paper's three fields."""
    if context.project.settings.collect.condition_on_x:
        return "collect.condition_on_x is set: all of OCD's rows are conditioned on x"
    branch = _branch(context, "conditioned-on-x", {"collect.condition_on_x": True}, LEARNED)
    other = with_denoiser(make_subject(branch, branch.layer), branch, None, subject.ensemble)
    return elsewhere_row(row.WITH_X, other)


def _by_paper(context: RunContext, subject: Subject) -> Row | str:
    """OCD without neighbours, and without tuning by the task's loss."""
    if not goes_beyond(context):
        return OWN_WAY
    values = {"train-diffusion.neighbours": 0, "train-diffusion.tune_after": 0}
    branch = _branch(context, "paper-objective", values, LEARNED)
    return elsewhere_row(row.BY_PAPER, with_denoiser(subject, branch, None, subject.ensemble))


def goes_beyond(context: RunContext) -> bool:
    """Whether the run's denoiser is told of neighbours, or tuned."""
    table = context.project.settings.train_diffusion
    return bool(table.neighbours or table.tune_after)


def _deep_ensemble(context: RunContext, subject: Subject) -> Row | str:
    """The base and four more, trained with other seeds (Lakshminarayanan et al., 2017)."""
    if "weights" in context.manifest_of("train-base").sources:
        return "the base was imported: others like it cannot be trained"
    seeds = range(context.seed + 1, context.seed + ENSEMBLE_OF)
    # Every base learns from the same samples.
    given = context.project.settings.task.validation_seed
    same = {"task.validation_seed": context.seed if given is None else given}
    branches = [_branch(context, f"deep-ensemble-{seed}", {"run.seed": seed, **same}, ("train-base",)) for seed in seeds]
    models = [context.base, *(branch.another_base() for branch in branches)]

    def members(batch: Batch) -> Members:
        outputs = tree_map(lambda *parts: torch.stack(parts), *(context.forward(model, batch.x) for model in models))
        return lambda strength: outputs

    return Row(row.DEEP, members)


def _longer_takes_too_long(context: RunContext) -> str | None:
    """Why the base is not trained for as long again unless asked; None where it took less than a minute, or less time than
    OCD's other stages."""
    if not context.project.settings.evaluate.longer_base:
        return "evaluate.longer_base is false"
    seconds = stage_seconds(context)
    base, rest = seconds.pop("train-base"), sum(seconds.values())
    if base < max(rest, CHEAP_S):
        return None
    return f"the base's training took {base:,.0f} s, OCD's stages {rest:,.0f} s"


def _longer(context: RunContext, subject: Subject) -> Row | str:
    """The base after twice its epochs."""
    values = longer_settings(context)
    if not values["train-base.epochs"]:
        return "the base was imported, or trained by the task: its training cannot be continued"
    model = _branch(context, "base-trained-longer", values, ("train-base",)).another_base()
    return output_row(row.LONGER, lambda batch: context.forward(model, batch.x))


def longer_settings(context: RunContext) -> dict[str, int]:
    """What trains the base for as long again, the best epoch of all kept."""
    reached = context.manifest_of("train-base").extents["train-base.epochs"].reached
    return {"train-base.epochs": 2 * reached, "train-base.patience": 0}


def whole_network_row(context: RunContext, samples: int) -> Row | str:
    """Every layer overfitted on test, sample by sample; or why not."""
    model, recipe = context.another_base(), recipe_of(context.project.settings.collect)
    if any(parameter.dtype in HALF for parameter in model.parameters()):
        model.float()

    def one(x: Tree, y: Tree) -> Tree:
        return overfit_whole(model, context.forward, lambda output, labels: losses(context.task, output, labels), recipe, x, y)

    def each(batch: Batch) -> Tree:
        spans = [slice(i, i + 1) for i in range(len(batch))]
        return concatenate([one(take(batch.x, span), take(batch.y, span)) for span in spans])

    split = context.test_split
    start = time.perf_counter()
    for position in range(min(TRIED, len(split))):
        x, y = split.batch([position])
        one(to_device(x, context.device), to_device(y, context.device))
    context.wait()
    seconds = (time.perf_counter() - start) / min(TRIED, len(split)) * samples
    if seconds > LONGEST_S and row.ORACLE_ALL not in context.project.settings.evaluate.rows:
        return f"sample by sample it would take about {seconds / 60:.0f} minutes; ask with --add '{row.ORACLE_ALL}'"
    return output_row(row.ORACLE_ALL, each)


def seed_branches(context: RunContext) -> Iterable[tuple[int, Project]]:
    """Whole trainings with the seeds after the run's own, each evaluated: seed and branch."""
    project, base = context.project, folder_of(context.project, "train-base")
    imported = "weights" in base.manifest().sources and project.settings.task.weights is None
    weights = {"task.weights": str(base.path / BASE_FILE)} if imported else {}
    # Of the rows asked for, the one that the verdict looks at.
    rows = [name for name in project.settings.evaluate.rows if name == row.LONGER]
    for seed in range(project.seed + 1, project.seed + project.settings.evaluate.seeds):
        values = {"run.seed": seed, "evaluate.seeds": 1, "evaluate.rows": rows, **weights}
        branch = branch_of(project, f"seed-{seed}", values)
        context.report.message(f"seed {seed}: all stages, in {branch.run_path}")
        bring_up(project, branch, ORDER[: ORDER.index("evaluate") + 1], context.report)
        yield seed, branch
