"""The stages' commands by name, each imported when it is asked for: commands do not import one another."""

import importlib
from collections.abc import Callable

from stages.lifecycle.results import CommandResult

# (project, *, force=False, dry_run=False, report=None) -> CommandResult
Command = Callable[..., CommandResult]


def command_of(stage: str) -> Command:
    """The function of a stage, which has the name of its module."""
    name = stage.replace("-", "_")
    return getattr(importlib.import_module(f"stages.{name}"), name)
