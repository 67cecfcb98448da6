"""Branches: further runs of the same project with other settings, under `branches/`, that share what they can."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from stages.artifacts.files import link_or_copy, remove
from stages.artifacts.pipeline import STAGES, identity_settings
from stages.artifacts.project import Project, check_settings
from stages.artifacts.run_directory import MANIFEST, folder_of, prepare_run
from stages.artifacts.states import DONE, MISSING, PARTIAL, States
from stages.outcome import Outcome

BRANCHES = "branches"
# A stage's command: the project and whether to redo what is stale.
Command = Callable[[Project, bool], Outcome]


def branch_of(project: Project, name: str, values: Mapping[str, Any]) -> Project:
    """The project with other settings ("table.key" to value) and a run directory of its own.

    Raises:
        SettingsError: a value that cannot be.
    """
    raw = {
        table: {key: value for key, value in entries.items() if value is not None}
        for table, entries in project.settings.model_dump(by_alias=True).items()
    }
    _take_over(raw, project)
    for key, value in values.items():
        table, _, setting = key.partition(".")
        raw[table][setting] = value
    settings = check_settings(raw, f"branch {name} of {project.config_path}")
    return Project(settings, project.config_path, project.run_path / BRANCHES / name, project.overrides)


def _take_over(raw: dict[str, dict[str, Any]], project: Project) -> None:
    """What flags of earlier commands have decided, and later ones need not repeat: the layer, and weights to import."""
    for name, table, key in (("select-layer", "select-layer", "layer"), ("train-base", "task", "weights")):
        manifest = folder_of(project, name).manifest()
        if manifest is None:
            continue
        if key == "layer":
            raw[table][key] = manifest["identity"]["settings"]["select-layer.layer"]
        elif key in manifest["sources"]:
            raw[table][key] = manifest["sources"][key]["path"]


def bring_up(project: Project, branch: Project, names: Iterable[str], commands: Mapping[str, Command]) -> None:
    """Bring stages of a branch up to date: those that are the project's own are linked, others made; stale ones are redone.

    Args:
        project: where the branch comes from, every one of `names` done.
        branch: as `branch_of`.
        names: stages, in the pipeline's order.
        commands: each stage's command.

    Raises:
        OcdError: the first that fails; it goes on where it was when the branch is asked for again.
    """
    prepare_run(branch)
    for name in names:
        if States(branch).of(name).state == DONE:
            continue
        if _is_shared(project, branch, name):
            _link(project, branch, name)
        state = States(branch).of(name).state
        if state != DONE:
            # What was linked may only be the beginning: a longer training goes on from it.
            commands[name](branch, state not in (MISSING, PARTIAL))


def _is_shared(project: Project, branch: Project, name: str) -> bool:
    """Whether the project's own result is what the branch's settings and earlier stages would give."""
    spec, manifest = STAGES[name], folder_of(project, name).manifest()
    if manifest is None:
        return False
    recorded = manifest["identity"]
    if identity_settings(branch, spec, manifest) != recorded["settings"]:
        return False
    for earlier in spec.reads:
        mine = folder_of(branch, earlier).manifest()
        if mine is None or mine["content"] != recorded["inputs"][STAGES[earlier].content]:
            return False
    return True


def _link(project: Project, branch: Project, name: str) -> None:
    """Put the project's finished folder into the branch, in place of another result."""
    source, target = folder_of(project, name), folder_of(branch, name)
    with target.lock():
        remove(target.wip)
        paths = [path for path in source.found.rglob("*") if path.is_file()]
        # The manifest last: an unfinished folder that has one counts as whole.
        for path in sorted(paths, key=lambda path: path.name == MANIFEST):
            link_or_copy(path, target.wip / path.relative_to(source.found))
        target.exchange()
