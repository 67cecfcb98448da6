"""run: bring the stages up to date, in order."""

from collections.abc import Callable, Iterator

from stages.foundation.errors import ArtifactError, SettingsError
from stages.lifecycle.outcome import Outcome
from stages.run_directory.pipeline import AUTO, ORDER
from stages.run_directory.project import Project
from stages.run_directory.states import MISSING

# A stage's command, with everything but its progress decided.
StageCommand = Callable[[], Outcome]


def stages_between(start: str | None, until: str | None) -> tuple[str, ...]:
    """The stages from `start` to `until`, both included.

    Raises:
        SettingsError: an unknown stage, or an end before the start.
    """
    for option, name in (("--from", start), ("--until", until)):
        if name is not None and name not in ORDER:
            raise SettingsError(f"{option} {name}: unknown stage", f"the stages are {', '.join(ORDER)}")
    first, last = ORDER.index(start or ORDER[0]), ORDER.index(until or ORDER[-1])
    if last < first:
        raise SettingsError(f"--until {until} comes before --from {start}", f"the order is {', '.join(ORDER)}")
    return ORDER[first : last + 1]


def _asked_for(project: Project, name: str, ends: tuple[str | None, ...]) -> bool:
    """Whether a stage in between is to be run: an evaluation only where it is named, or where predictions need it."""
    return name != "evaluate" or name in ends or project.settings.infer.strength == AUTO


def run(
    project: Project,
    commands: dict[str, StageCommand],
    start: str | None = None,
    until: str | None = None,
    *,
    dry_run: bool = False,
) -> Iterator[Outcome]:
    """Bring the stages from `start` to `until` up to date, in order; the first failure ends it. `evaluate` is left out, unless
    it is named or `infer.strength = "auto"` needs it.

    Args:
        project: the project.
        commands: each stage's command by name. They are given, not imported: commands do not know one another.
        start: first stage, by default train-base.
        until: last stage, by default infer.
        dry_run: the commands only plan; a stage whose inputs are yet to be made is then no failure.

    Yields:
        each stage's outcome as it comes.

    Raises:
        OcdError: the first stage's that fails.
    """
    for name in stages_between(start, until):
        if not _asked_for(project, name, (start, until)):
            continue
        try:
            yield commands[name]()
        except ArtifactError as error:
            if not dry_run:
                raise
            yield Outcome(name, {"stage": name, "state": MISSING, "what": f"not known yet: {error.message}"}, planned=True)
