"""run: bring the stages up to date, in order."""

from collections.abc import Iterator

from stages.foundation.errors import ArtifactError, SettingsError
from stages.foundation.progress import Report
from stages.lifecycle.results import CommandResult, command_of
from stages.run_directory.pipeline import ORDER, in_turn, spec_of
from stages.run_directory.project import Project
from stages.run_directory.states import MISSING


def stages_between(project: Project, start: str | None, until: str | None) -> list[str]:
    """The stages from `start` to `until`, both included, in the order that the project's settings need.

    Raises:
        SettingsError: an unknown stage, or an end before the start.
    """
    for option, name in (("--from", start), ("--until", until)):
        if name is not None and name not in ORDER:
            raise SettingsError(f"{option} {name}: unknown stage", f"the stages are {', '.join(ORDER)}")
    last = ORDER.index(until or ORDER[-1])
    if last < ORDER.index(start or ORDER[0]):
        raise SettingsError(f"--until {until} comes before --from {start}", f"the order is {', '.join(ORDER)}")
    # Where the two trainings change places, the end is where all of these are done.
    order = in_turn(project)
    return order[order.index(start or ORDER[0]) : max(map(order.index, ORDER[: last + 1])) + 1]


def run(
    project: Project,
    start: str | None = None,
    until: str | None = None,
    *,
    force: bool = False,
    dry_run: bool = False,
    report: Report | None = None,
) -> Iterator[CommandResult]:
    """Bring the stages from `start` to `until` up to date, in order; the first failure ends it. `evaluate` is left out, unless
    it is named, or `infer` asks for what it finds, as for another row or the strength `auto`.

    Args:
        start: first stage, by default train-base.
        until: last stage, by default infer.
        dry_run: only plan; a stage whose inputs are yet to be made is then no failure.

    Raises:
        OcdError: the first stage's that fails.
    """
    for name in stages_between(project, start, until):
        if name == "evaluate" and name not in (start, until) and name not in spec_of(project, "infer").reads:
            continue
        try:
            yield command_of(name)(project, force=force, dry_run=dry_run, report=report)
        except ArtifactError as error:
            if not dry_run:
                raise
            planned = {"stage": name, "state": MISSING, "what": f"not known yet: {error.message}"}
            yield CommandResult(name, planned, planned=True)
