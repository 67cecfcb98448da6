"""Branches: further runs of the same project with other settings, under `branches/`, that share what they can."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stages.foundation.files import link_or_copy, remove
from stages.foundation.progress import Report
from stages.lifecycle.context import RunContext
from stages.lifecycle.results import command_of
from stages.run_directory.folders import MANIFEST, folder_of, prepare_run
from stages.run_directory.pipeline import STAGES, extent_settings, identity_settings, in_turn, spec_of
from stages.run_directory.project import Project, check_settings
from stages.run_directory.states import DONE, MISSING, PARTIAL, States

BRANCHES = "branches"


def branch_of(project: Project, name: str, values: Mapping[str, Any], folder: Path | None = None) -> Project:
    """The project with other settings ("table.key" to value) and a run directory of its own, by default under `branches`.

    Raises:
        SettingsError: a value that cannot be.
    """
    raw = {
        table: {key: value for key, value in entries.items() if value is not None}
        for table, entries in project.settings.model_dump(by_alias=True).items()
    }
    for key, value in values.items():
        table, _, setting = key.partition(".")
        raw[table][setting] = value
    settings = check_settings(raw, f"branch {name} of {project.config_path}")
    return Project(settings, project.config_path, folder or project.run_path / BRANCHES / name, project.overrides)


def bring_up(project: Project, branch: Project, names: Iterable[str], report: Report) -> None:
    """Bring stages of a branch up to date: those that are the project's own are linked, others made; stale ones are redone.
    What the project has not got itself is made, too.

    Raises:
        OcdError: the first that fails; it goes on where it was when the branch is asked for again.
    """
    prepare_run(branch)
    wanted = set(names)
    for name in (name for name in in_turn(branch) if name in wanted):
        if _to_link(project, branch, name):
            _link(project, branch, name)
        state = _state(branch, name)
        if state != DONE:
            # What was linked may only be the beginning: a longer training goes on from it.
            command_of(name)(branch, force=state not in (MISSING, PARTIAL), report=report)


def _state(branch: Project, name: str) -> str:
    """A stage's state in the branch, by the data as they are now."""
    return States(branch, RunContext(branch).hash_dataset).of(name).state


def _to_link(project: Project, branch: Project, name: str) -> bool:
    """Whether the branch is to take the project's own result: it would be the same, and the branch has not got it (or what goes
    on from it)."""
    if not _is_shared(project, branch, name) or _goes_less_far(project, branch, name):
        return False
    if _state(branch, name) != DONE:
        return True
    as_far = extent_settings(branch, STAGES[name]) == extent_settings(project, STAGES[name])
    mine, its = folder_of(branch, name).manifest(), folder_of(project, name).manifest()
    return as_far and mine.content != its.content


def _goes_less_far(project: Project, branch: Project, name: str) -> bool:
    """Whether the branch asks for less than the project's own result holds: it would be made anew."""
    mine, its = (extent_settings(one, STAGES[name]) for one in (branch, project))
    return any(isinstance(asked, int) and (its[key] == "all" or asked < its[key]) for key, asked in mine.items())


def _is_shared(project: Project, branch: Project, name: str) -> bool:
    """Whether the project's own result is what the branch's settings and earlier stages would give."""
    spec, manifest = spec_of(branch, name), folder_of(project, name).manifest()
    if manifest is None:
        return False
    recorded = manifest.identity
    if identity_settings(branch, spec, manifest) != recorded.settings:
        return False
    for earlier in spec.reads:
        mine = folder_of(branch, earlier).manifest()
        if mine is None or mine.content != recorded.inputs.get(STAGES[earlier].content):
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
