"""What a stage's work hands over to its manifest, what its command gives back to the caller, and the commands by name."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.run_directory.format import Extent, StoreDescription


@dataclass(frozen=True)
class WorkResult:
    """What a stage's work hands over when it is whole: the part of the manifest that it alone knows.

    Attributes:
        content: the hash (or, for select-layer, the name) that later stages depend on.
        extents: how far it went, by "stage.key".
        hashes: sha256 of files that are known already, by name.
        store: of collect, the description of its store.
        chosen: what `auto` came to, where that is no setting of the identity, by "stage.key".
    """

    summary: dict[str, Any]
    content: str
    extents: dict[str, Extent] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    store: StoreDescription | None = None
    chosen: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CommandResult:
    """What a stage's command gives back.

    Attributes:
        summary: its result, as the manifest keeps it; of a dry run, what would be done.
        up_to_date: nothing had to be done.
        planned: this was a dry run.
        waits: this part of the work is done, others are not.
        path: where the result lies.
        follows: this process only took part in what another one leads, which speaks for both.
    """

    stage: str
    summary: dict[str, Any]
    up_to_date: bool = False
    planned: bool = False
    waits: bool = False
    path: Path | None = None
    follows: bool = False


# (project, *, force=False, dry_run=False, report=None) -> CommandResult
Command = Callable[..., CommandResult]


def command_of(stage: str) -> Command:
    """The function of a stage, which has the name of its module; imported here, for commands do not import one another."""
    name = stage.replace("-", "_")
    return getattr(importlib.import_module(f"stages.{name}"), name)
