"""The stages as data: their order, what each reads, and where its folder lies. Imports neither torch nor zarr."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from stages.foundation.config import EXTENT, IDENTITY, Table
from stages.run_directory.project import Project

# `auto` is hashed as what it was resolved to. For a stage that exists, it means what the manifest records, so that
# `ocd select-layer --layer fc1.weight` followed by a plain `ocd collect` is no contradiction.
AUTO = "auto"
# Of these, what was made holds what is asked for where it was asked for more.
MORE_IS_FINE = ("evaluate.rows", "evaluate.seeds")


@dataclass(frozen=True)
class StageSpec:
    """One stage: its name, the stages it reads, the data splits it reads, and whether it runs the user's code.

    `content` names what later stages take from it, as it appears among their inputs. A stage that `mends` redoes what of its
    result is damaged, and nothing else. `settings` are those of other tables that its result depends on.
    """

    name: str
    reads: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    task: bool = True
    content: str = ""
    mends: bool = False
    settings: tuple[str, ...] = ()


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
            settings=("infer.ensemble", "infer.sample_steps", "infer.sampler", "infer.strength"),
        ),
        StageSpec("infer", ("train-base", "select-layer", "train-diffusion", "train-scale"), ("input",)),
    )
}
ORDER = tuple(STAGES)


def spec_of(project: Project, name: str) -> StageSpec:
    """A stage's place in the pipeline; predictions at the strength that `evaluate` fitted come after it, and a denoiser that is
    tuned reads what the task's loss is computed from."""
    spec = STAGES[name]
    if name == "train-diffusion" and project.settings.train_diffusion.tune_after:
        return dataclasses.replace(spec, reads=STAGES["collect"].reads + spec.reads, data=("train",), task=True)
    if name == "infer" and project.settings.infer.strength == AUTO:
        return dataclasses.replace(spec, reads=(*spec.reads, "evaluate"))
    return spec


def identity_settings(project: Project, spec: StageSpec, recorded: dict[str, Any] | None = None) -> dict[str, Any]:
    """The identity settings of a stage by their dotted names, `auto` as `recorded` resolves it. One that `recorded` does not
    know, for it was made before there was such a setting, is left out at its default, which is what was done then."""
    settings = project.settings
    tables = [(spec.name, settings.table(spec.name))] + ([("task", settings.task)] if spec.task else [])
    found = {f"{name}.{key}": value for name, table in tables for key, value in table.of_kind(IDENTITY).items()}
    defaults = {key: value for name, table in tables for key, value in _defaults(name, table).items()}
    for name in spec.settings:
        table, _, key = name.partition(".")
        found[name] = getattr(settings.table(table), key)
    found["run.seed"] = project.seed
    if settings.table(spec.name).of_kind(IDENTITY).get("lr_schedule") == "cosine":
        found[f"{spec.name}.max_steps"] = settings.table(spec.name).max_steps
    known = (recorded or {}).get("identity", {}).get("settings", {})
    # Naming what `auto` had come to is no change either.
    chosen = (recorded or {}).get("chosen", {})
    return {
        key: known.get(key, value) if value == AUTO or (known.get(key) == AUTO and chosen.get(key) == value) else value
        for key, value in found.items()
        if not known or key in known or key not in defaults or value != defaults[key]
    } | {key: known[key] for key in MORE_IS_FINE if key in known and key in found and _covers(known[key], found[key])}


def _covers(made: Any, wanted: Any) -> bool:
    """Whether what was made is as much as what is wanted, or more."""
    return set(made) >= set(wanted) if isinstance(made, list) else made >= wanted


def _defaults(name: str, table: Table) -> dict[str, Any]:
    """The defaults of a table's identity settings by their dotted names."""
    return {f"{name}.{key}": value for key, value in type(table)().of_kind(IDENTITY).items()}


def extent_settings(project: Project, spec: StageSpec) -> dict[str, Any]:
    """The extent settings of a stage by their dotted names."""
    return {f"{spec.name}.{key}": value for key, value in project.settings.table(spec.name).of_kind(EXTENT).items()}
