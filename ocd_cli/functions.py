"""The stages' functions by name, for the commands that call several."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.foundation.progress import Report
    from stages.lifecycle.outcome import Outcome
    from stages.run_directory.project import Project


def stage_functions() -> dict[str, Callable[..., "Outcome"]]:
    """Every stage's function by its command's name, `f(project, force=, dry_run=, report=)`."""
    from stages.collect import collect as collect_stage
    from stages.evaluate import evaluate as evaluate_stage
    from stages.infer import infer as infer_stage
    from stages.select_layer import select_layer as select_layer_stage
    from stages.train_base import train_base as train_base_stage
    from stages.train_diffusion import train_diffusion as train_diffusion_stage
    from stages.train_scale import train_scale as train_scale_stage

    functions = {
        "train-base": train_base_stage,
        "select-layer": select_layer_stage,
        "collect": collect_stage,
        "train-diffusion": train_diffusion_stage,
        "train-scale": train_scale_stage,
        "infer": infer_stage,
    }

    def evaluate_with_branches(project: "Project", *, report: "Report", **options: bool) -> "Outcome":
        def branch_command(name: str) -> Callable[["Project", bool], "Outcome"]:
            return lambda branch, force: functions[name](branch, force=force, report=report)

        commands = {name: branch_command(name) for name in functions}
        return evaluate_stage(project, commands, report=report, **options)

    functions["evaluate"] = evaluate_with_branches
    return functions
