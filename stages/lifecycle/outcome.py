"""What a stage's work hands over, and what its command gives back."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a stage's command gives back.

    Attributes:
        stage: its name.
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


@dataclass(frozen=True)
class Finished:
    """What a stage's work hands over when it is whole.

    Attributes:
        summary: figures worth printing.
        content: the hash (or, for select-layer, the name) that later stages depend on.
        extents: "stage.key" to {"value", "reached", "exhausted"}.
        extra: further entries of the manifest.
        hashes: sha256 of files that are known already, by name.
    """

    summary: dict[str, Any]
    content: str
    extents: dict[str, dict[str, Any]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
