"""The stages as data: their order, what each reads, and where its folder lies. Imports neither torch nor zarr."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from stages.foundation.setting import EXTENT, IDENTITY, Table
from stages.run_directory.format import Begun, Manifest
from stages.run_directory.project import Project

# `auto` is hashed as what it was resolved to. For a stage that exists, it means what the manifest records, so that a width or a
# strength stays as it was found. A layer is the exception: one that was named is not what `auto` asks for, unless the scores
# choose it, too.
AUTO = "auto"
# What `infer` predicts with unless it is asked for another row of `evaluate`.
OWN_ROW = "ocd ensemble"
LAYER = "select-layer.layer"
# Of these, what was made holds what is asked for where it was asked for more.
MORE_IS_FINE = ("evaluate.rows", "evaluate.seeds")


@dataclass(frozen=True)
class StageSpec:
    """One stage.

    Attributes:
        name: of its command, its table and its folder.
        data: the data splits it reads; `input` is what a query names.
        task: whether it runs the user's code.
        content: what later stages take from it, as it appears among their inputs.
        mends: it redoes what of its result is damaged, and nothing else.
        redoes_stale: asked with other settings it begins anew, for it is a question that nothing else depends on.
        settings: those of other tables that its result depends on.
    """

    name: str
    reads: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    task: bool = True
    content: str = ""
    mends: bool = False
    redoes_stale: bool = False
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Query:
    """What infer is asked.

    Attributes:
        name: of the answer's folder.
        split: the split whose content counts, "" where it is a file's.
        content: what tells these inputs from others.
    """

    name: str = "test"
    split: str = "test"
    content: str = "test"


STAGES = {
    spec.name: spec
    for spec in (
        StageSpec("train-base", data=("train", "validation", "weights"), content="base"),
        StageSpec("select-layer", ("train-base",), ("train", "validation"), content="layer"),
        StageSpec("collect", ("train-base", "select-layer"), ("train", "validation"), content="deltas", mends=True),
        StageSpec("train-diffusion", ("collect",), task=False, content="denoiser"),
        StageSpec("train-scale", ("collect",), task=False, content="scale"),
        StageSpec(
            "evaluate",
            ("train-base", "select-layer", "collect", "train-diffusion", "train-scale"),
            ("train", "validation", "test"),
            content="strength",
            redoes_stale=True,
            settings=("infer.ensemble", "infer.sample_steps", "infer.sampler", "infer.strength"),
        ),
        StageSpec("infer", ("train-base", "select-layer", "train-diffusion", "train-scale"), ("input",), redoes_stale=True),
    )
}
ORDER = tuple(STAGES)
TRAININGS = ("train-diffusion", "train-scale")
# What train-scale goes by beside its own settings, where neighbours are told of.
OF_NEIGHBOURS = ("train-diffusion.neighbours", "train-diffusion.neighbours_in", "train-diffusion.held_out")
# Where `auto` is recorded as it is: what it comes to is known when the stage ends, and its default is another value.
DECIDED_LATE = ("train-diffusion.tune_after",)
# What all predictions need.
LEARNED = ORDER[: ORDER.index("train-scale") + 1]


def spec_of(project: Project, name: str) -> StageSpec:
    """A stage's place in the pipeline; predictions with another row of `evaluate`, or at the strength that it fitted, come
    after it; a denoiser that is tuned reads what the task's loss is computed from, and predicted lengths; and trainings that
    are told of neighbours read samples and run the base."""
    spec = STAGES[name]
    diffusion = project.settings.train_diffusion
    tuned, near = name == "train-diffusion" and diffusion.tune_after, name in TRAININGS and diffusion.neighbours
    if tuned or near:
        reads = (*STAGES["collect"].reads, *spec.reads, *(["train-scale"] if tuned else []))
        data = ("train", "validation") if tuned else ("train",)
        settings = (*spec.settings, *(OF_NEIGHBOURS if near and name != "train-diffusion" else ()))
        return dataclasses.replace(spec, reads=reads, data=data, task=True, settings=settings)
    if name == "infer" and project.settings.infer.row != OWN_ROW:
        # Neighbours are looked for among the training samples, and a task's own rows may be trained on both. How many they are
        # is not in what it takes from evaluate.
        return dataclasses.replace(
            spec,
            reads=(*STAGES["evaluate"].reads, "evaluate"),
            data=("input", "train", "validation"),
            settings=("evaluate.neighbours",),
        )
    if name == "infer" and project.settings.infer.strength == AUTO:
        return dataclasses.replace(spec, reads=(*spec.reads, "evaluate"))
    return spec


def in_turn(project: Project) -> list[str]:
    """The stages so that each comes after what it reads: train-scale before a denoiser that is tuned."""
    if "train-scale" not in spec_of(project, "train-diffusion").reads:
        return list(ORDER)
    names = [name for name in ORDER if name != "train-scale"]
    names.insert(names.index("train-diffusion"), "train-scale")
    return names


def identity_settings(project: Project, spec: StageSpec, recorded: Begun | Manifest | None = None) -> dict[str, Any]:
    """The identity settings of a stage by their dotted names, `auto` as `recorded` resolves it."""
    settings = project.settings
    tables = [(spec.name, settings.table(spec.name))] + ([("task", settings.task)] if spec.task else [])
    known = recorded.identity.settings if recorded else {}
    # What an earlier version made without a setting is what it makes by the setting's default.
    unheard = {f"{name}.{key}" for name, table in tables for key in _by_default(table)} - known.keys()
    found = {f"{name}.{key}": value for name, table in tables for key, value in table.of_kind(IDENTITY).items()}
    if recorded:
        found = {key: value for key, value in found.items() if key not in unheard}
    for name in spec.settings:
        table, _, key = name.partition(".")
        found[name] = getattr(settings.table(table), key)
    found["run.seed"] = project.seed
    if spec.name == "train-base" and (key := settings.task.weights_key or known.get("task.weights_key")):
        # As the file itself, it may have been given by a flag, which later commands do not repeat.
        found["task.weights_key"] = key
    if settings.table(spec.name).of_kind(IDENTITY).get("lr_schedule") == "cosine":
        found[f"{spec.name}.max_steps"] = settings.table(spec.name).max_steps
    if known.get(LAYER) not in (AUTO, chosen_by_scores(recorded)):
        known = {key: value for key, value in known.items() if key != LAYER}
    # Naming what `auto` had come to is no change either.
    chosen = recorded.chosen if isinstance(recorded, Manifest) else {}
    return {
        key: known.get(key, value) if _same(key, value, known.get(key), chosen.get(key)) else value
        for key, value in found.items()
    } | {key: known[key] for key in MORE_IS_FINE if key in known and key in found and _covers(known[key], found[key])}


def _same(key: str, asked: Any, known: Any, chosen: Any) -> bool:
    """Whether a setting stands for what is recorded: `auto` for what it may have come to, and what it came to for `auto`."""
    return (asked == AUTO and key not in DECIDED_LATE) or (known == AUTO and chosen == asked)


def _by_default(table: Table) -> list[str]:
    """The settings of a table that are what they are by default."""
    fields = type(table).model_fields.items()
    return [info.alias or name for name, info in fields if getattr(table, name) == info.get_default(call_default_factory=True)]


def chosen_by_scores(recorded: Begun | Manifest | None) -> str | None:
    """The layer with the highest of the scores that select-layer left, where it left some."""
    candidates = recorded.summary.get("candidates", []) if isinstance(recorded, Manifest) else []
    scores = {candidate["name"]: candidate["score"] for candidate in candidates if candidate["score"] is not None}
    return max(scores, key=scores.get, default=None)


def _covers(made: Any, wanted: Any) -> bool:
    """Whether what was made is as much as what is wanted, or more."""
    return set(made) >= set(wanted) if isinstance(made, list) else made >= wanted


def extent_settings(project: Project, spec: StageSpec) -> dict[str, Any]:
    """The extent settings of a stage by their dotted names."""
    return {f"{spec.name}.{key}": value for key, value in project.settings.table(spec.name).of_kind(EXTENT).items()}
