"""status: the state of every stage, without torch, zarr or the user's code."""

from typing import Any

from stages.run_directory.folders import check_run, folder_of
from stages.run_directory.locks import holders
from stages.run_directory.project import Project
from stages.run_directory.states import MISSING, States


def status(project: Project) -> dict[str, Any]:
    """The state of each stage (`evaluate` once it has been asked for), and of answers to other queries than the test split.

    Returns:
        {"run", "stages": {name: {"state", "detail", "progress", "changed": [{"setting", "was", "now"}], "in_use_by": [text]}},
        "queries": [names]}.

    Raises:
        ArtifactError: the run directory is another task's or format version's.
    """
    check_run(project)
    stages = {}
    for state in States(project).all():
        # An evaluation is made on request: before, it is not missing.
        if state.name != "evaluate" or state.state != MISSING:
            found = {"state": state.state, "detail": state.detail, "progress": state.progress}
            changed, folder = [vars(change) for change in state.changes], folder_of(project, state.name)
            stages[state.name] = {**found, "changed": changed, "in_use_by": holders(folder.run, folder.name)}
    answers = (project.run_path / "infer").glob("*/manifest.json")
    queries = sorted(path.parent.name for path in answers if path.parent.suffix == "")
    return {"run": str(project.run_path), "stages": stages, "queries": [name for name in queries if name != "test"]}
