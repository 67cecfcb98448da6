"""The stages' commands by name, each imported when it is asked for: commands do not import one another."""

import importlib
from collections.abc import Callable

from stages.lifecycle.results import CommandResult
from stages.run_directory.pipeline import STAGES

# (project, *, force=False, dry_run=False, report=None) -> CommandResult
Command = Callable[..., CommandResult]


def command_of(stage: str) -> Command:
    """The function that the stage's spec names."""
    module, _, name = STAGES[stage].entry.partition(":")
    return getattr(importlib.import_module(module), name)
