"""status: the state of every stage, without torch, zarr or the user's code."""

from typing import Any

from stages.artifacts.project import Project
from stages.artifacts.run_directory import StageFolder, check_run, folder_of
from stages.artifacts.states import StageState, States, progress_of


def status(project: Project) -> dict[str, Any]:
    """The state of each stage, and of answers to other queries than the test split.

    Returns:
        {"run", "stages": {name: {"state", "detail", "progress", "changed": [{"setting", "was", "now"}]}}, "queries": [names]}.

    Raises:
        ArtifactError: the run directory is another task's or format version's.
    """
    check_run(project)
    stages = {state.name: _describe(state, folder_of(project, state.name)) for state in States(project).all()}
    folder = project.run_path / "infer"
    queries = sorted(path.parent.name for path in folder.glob("*/manifest.json") if path.parent.suffix == "")
    return {"run": str(project.run_path), "stages": stages, "queries": [name for name in queries if name != "test"]}


def _describe(state: StageState, folder: StageFolder) -> dict[str, Any]:
    changed = [{"setting": change.setting, "was": change.was, "now": change.now} for change in state.changes]
    progress = progress_of(folder) if folder.wip.exists() else None
    return {"state": state.state, "detail": state.detail, "progress": progress, "changed": changed}
