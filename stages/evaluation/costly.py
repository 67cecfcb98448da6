"""Rows of `evaluate` that cost a training, each made in a branch of the run that shares what it can."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from stages.evaluation import rows as row
from stages.evaluation.examination import make_subject, with_denoiser
from stages.evaluation.rows import ElsewhereRow, OutputRow, Row
from stages.evaluation.subject import Batch, Subject
from stages.foundation.errors import ComputeError, SettingsError, TaskError
from stages.foundation.trees import Tree, concatenate, take, to_device
from stages.lifecycle.branches import Command, branch_of, bring_up
from stages.lifecycle.materials import BASE_FILE, Materials
from stages.overfitting.overfit import Recipe
from stages.overfitting.whole_network import overfit_whole
from stages.run_directory.folders import folder_of
from stages.run_directory.pipeline import ORDER
from stages.run_directory.project import Project
from stages.tasks.loader import losses

# Overfitting all layers goes sample by sample: what would take longer has to be asked for.
LONGEST_S = 180.0
TRIED = 3

LeftOut = dict[str, str]


def costly_rows(
    materials: Materials, subject: Subject, commands: Mapping[str, Command], tell: Callable[[str], None]
) -> tuple[list[Row], LeftOut]:
    """The rows that `[evaluate] rows` asks for and that need a training, and those left out, with the reason.

    Args:
        materials: of the run.
        subject: what is examined.
        commands: the stages' commands, for branches.
        tell: hears of each branch that is begun.

    Raises:
        ArtifactError, TryAgainError: a stage of a branch fails; it goes on where it was when asked for again.
    """
    makers = {row.ALTERNATIVE: _alternative, row.REGRESSION_ROW: _regression, row.WITH_X: _with_x, row.LONGER: _longer}
    asked, found, left_out = materials.project.settings.evaluate.rows, [], {}
    for name, make in makers.items():
        made = _made(make, materials, subject, commands, tell) if name in asked else ""
        if isinstance(made, str):
            left_out[name] = made or f"not asked for: it takes a training; ask with --add '{name}'"
        else:
            found.append(made)
    return found, left_out


def _made(make: Callable[..., Row | str], *given: Any) -> Row | str:
    """A costly row, or why it cannot be: that another layer or network will not do is no fault of the run."""
    try:
        return make(*given)
    except (SettingsError, TaskError, ComputeError) as error:
        return error.message.splitlines()[0]


def _branch(
    materials: Materials,
    name: str,
    values: dict[str, Any],
    stages: Iterable[str],
    commands: Mapping[str, Command],
    tell: Callable[[str], None],
) -> Materials:
    project = branch_of(materials.project, name, values)
    tell(f"{name}: {', '.join(f'{key} = {value}' for key, value in values.items())}, in {project.run_path}")
    bring_up(materials.project, project, stages, commands)
    return Materials(project)


def _learned() -> tuple[str, ...]:
    return ORDER[: ORDER.index("train-scale") + 1]


def _alternative(
    materials: Materials, subject: Subject, commands: Mapping[str, Command], tell: Callable[[str], None]
) -> Row | str:
    """OCD on the layer with the second highest score; on that with the highest, where the second is the one chosen."""
    candidates = materials.manifest_of("select-layer")["summary"]["candidates"]
    scored = sorted((c for c in candidates if c["score"] is not None), key=lambda c: -c["score"])
    others = [c["name"] for c in scored[:2] if c["name"] != subject.layer.name]
    if not others:
        return "select-layer has no scores of other layers"
    values = {"select-layer.layer": others[-1], "select-layer.draws": 0}
    branch = _branch(materials, "alternative-layer", values, _learned(), commands, tell)
    other = with_denoiser(make_subject(branch, branch.layer), branch, None, subject.ensemble)
    return ElsewhereRow(row.ALTERNATIVE, other)


def _regression(
    materials: Materials, subject: Subject, commands: Mapping[str, Command], tell: Callable[[str], None]
) -> Row | str:
    """The same network regressing the unit delta from the conditioning (Eq. 1)."""
    values = {"train-diffusion.prediction": "mean"}
    branch = _branch(materials, "deterministic-hypernetwork", values, _learned(), commands, tell)
    other = with_denoiser(subject, branch, None, 1)
    return ElsewhereRow(row.REGRESSION_ROW, other)


def _with_x(materials: Materials, subject: Subject, commands: Mapping[str, Command], tell: Callable[[str], None]) -> Row | str:
    """OCD whose networks see x beside the paper's three fields."""
    if materials.project.settings.collect.condition_on_x:
        return "collect.condition_on_x is set: all of OCD's rows are conditioned on x"
    branch = _branch(materials, "conditioned-on-x", {"collect.condition_on_x": True}, _learned(), commands, tell)
    other = with_denoiser(make_subject(branch, branch.layer), branch, None, subject.ensemble)
    return ElsewhereRow(row.WITH_X, other)


def _longer(materials: Materials, subject: Subject, commands: Mapping[str, Command], tell: Callable[[str], None]) -> Row | str:
    """The base after twice its epochs."""
    reached = materials.manifest_of("train-base")["extents"]["train-base.epochs"]["reached"]
    if not reached:
        return "the base was imported, or trained by the task: its training cannot be continued"
    values = {"train-base.epochs": 2 * reached, "train-base.patience": 0}
    branch = _branch(materials, "base-trained-longer", values, ("train-base",), commands, tell)
    model = branch.another_base()
    return OutputRow(row.LONGER, lambda batch: materials.forward(model, batch.x))


def whole_network_row(materials: Materials, recipe: Recipe, samples: int) -> Row | str:
    """Every layer overfitted on test, sample by sample; or why not."""
    model = materials.another_base().float()

    def one(x: Tree, y: Tree) -> Tree:
        return overfit_whole(
            model, materials.forward, lambda output, labels: losses(materials.task, output, labels), recipe, x, y
        )

    def each(batch: Batch) -> Tree:
        spans = [slice(i, i + 1) for i in range(len(batch))]
        return concatenate([one(take(batch.x, span), take(batch.y, span)) for span in spans])

    split = materials.test_split
    start = time.perf_counter()
    for position in range(min(TRIED, len(split))):
        x, y = split.batch([position])
        one(to_device(x, materials.device), to_device(y, materials.device))
    seconds = (time.perf_counter() - start) / min(TRIED, len(split)) * samples
    if seconds > LONGEST_S and row.ORACLE_ALL not in materials.project.settings.evaluate.rows:
        return f"sample by sample it would take about {seconds / 60:.0f} minutes; ask with --add '{row.ORACLE_ALL}'"
    return OutputRow(row.ORACLE_ALL, each)


def seed_branches(
    project: Project, commands: Mapping[str, Command], tell: Callable[[str], None]
) -> Iterable[tuple[int, Project]]:
    """Whole trainings with the seeds after the run's own, each evaluated: seed and branch."""
    base = folder_of(project, "train-base")
    imported = "weights" in base.manifest()["sources"] and project.settings.task.weights is None
    weights = {"task.weights": str(base.path / BASE_FILE)} if imported else {}
    for seed in range(project.seed + 1, project.seed + project.settings.evaluate.seeds):
        values = {"run.seed": seed, "evaluate.seeds": 1, "evaluate.rows": [], **weights}
        branch = branch_of(project, f"seed-{seed}", values)
        tell(f"seed {seed}: all stages, in {branch.run_path}")
        bring_up(project, branch, ORDER[: ORDER.index("evaluate") + 1], commands)
        yield seed, branch
