"""status: the state of every stage, without torch, zarr or the user's code."""

from typing import Any

from stages.run_directory.folders import check_run, folder_of
from stages.run_directory.locks import holders
from stages.run_directory.project import Project
from stages.run_directory.states import MISSING, StageState, States


def status(project: Project) -> dict[str, Any]:
    """The state of each stage (`evaluate` once it has been asked for), and of answers to other queries than the test split.

    Returns:
        {"run", "stages": {name: {"state", "detail", "progress", "changed": [{"setting", "was", "now"}], "in_use_by": [text]}},
        "queries": [names]}.

    Raises:
        ArtifactError: the run directory is another task's or format version's.
    """
    check_run(project)
    # An evaluation is made on request: before, it is not missing.
    found = [state for state in States(project).all() if state.name != "evaluate" or state.state != MISSING]
    stages = {state.name: _describe(state) | {"in_use_by": _users(project, state.name)} for state in found}
    folder = project.run_path / "infer"
    queries = sorted(path.parent.name for path in folder.glob("*/manifest.json") if path.parent.suffix == "")
    return {"run": str(project.run_path), "stages": stages, "queries": [name for name in queries if name != "test"]}


def _describe(state: StageState) -> dict[str, Any]:
    changed = [{"setting": change.setting, "was": change.was, "now": change.now} for change in state.changes]
    return {"state": state.state, "detail": state.detail, "progress": state.progress, "changed": changed}


def _users(project: Project, stage: str) -> list[str]:
    """Who works on a stage at this moment."""
    folder = folder_of(project, stage)
    return holders(folder.run, folder.name)
