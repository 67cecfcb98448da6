"""What a row of the table of bad input is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from folders import PROJECTS, Folder

Change = Callable[[Folder, pytest.MonkeyPatch], Any]


@dataclass(frozen=True)
class Bad:
    """A command that must be refused.

    Attributes:
        id: what is wrong.
        words: the command; `{root}` and `{run}` are the project's folder and its run directory, `%20` is a blank.
        says: what the one message must hold; a text is the whole message.
        code: the exit code.
        settings: put into `ocd.toml`.
        project: the folder of tests/projects.
        finished: on a copy of a finished run, otherwise on a project without results.
        after: a command that goes before.
        change: what else is done to the project beforehand.
        hides: what the message must not hold.
        then: commands that must work afterwards, what the message says to type among them.
        mend: what is done to the project before these.
        begins: whether the stage has begun when it finds out, and leaves a folder of unfinished work.
        config: whether the command is told where the settings are.
    """

    id: str
    words: str
    says: str | Sequence[str]
    code: int = 2
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    project: str = "plain"
    finished: bool = False
    after: str = ""
    change: Change | None = None
    hides: Sequence[str] = ()
    then: Sequence[str] = ()
    mend: Change | None = None
    begins: bool = False
    config: bool = True


def at(text: str, function: str) -> str:
    """How a message names the line of the bad project that holds a text."""
    lines = (PROJECTS / "bad" / "mymodel.py").read_text().splitlines()
    return f"mymodel.py, line {next(n for n, line in enumerate(lines, 1) if text in line)}, in {function}"


def written(name: str, text: str) -> Change:
    """A file with this text."""
    return lambda folder, _: (folder.root / name).write_text(text)


def edited(name: str, old: str, new: str) -> Change:
    """A file with another text in place of one."""
    return lambda folder, _: folder.edit(name, old, new)
