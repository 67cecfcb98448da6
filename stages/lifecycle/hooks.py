"""What a subclass gives a stage, and what stages share; their life is `Stage`."""

import contextlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch

from stages.foundation.files import write_json
from stages.foundation.progress import Report, Silent
from stages.lifecycle.materials import Materials
from stages.lifecycle.outcome import Finished, Outcome
from stages.run_directory.folders import BEGUN, StageFolder, folder_of
from stages.run_directory.pipeline import StageSpec, spec_of
from stages.run_directory.project import Project
from stages.run_directory.states import States


class StageHooks(Materials, ABC):
    """What a stage says of itself, and what all stages have.

    Args:
        project: the project.
        report: hears of its progress.
    """

    name: ClassVar[str]
    redoes_stale: ClassVar[bool] = False
    # What lies in the unfinished folder for the work alone, and goes when the manifest is there.
    scratch: ClassVar[tuple[str, ...]] = ()

    def __init__(self, project: Project, report: Report | None = None) -> None:
        super().__init__(project)
        self.report: Report = report or Silent()
        self.states = States(project, self.hash_dataset)
        self._identity: dict[str, Any] = {}
        self._sources: dict[str, Any] = {}
        self._begun: dict[str, Any] = {}

    # What a subclass gives.

    @abstractmethod
    def plan(self) -> dict[str, Any]:
        """What would be done, how much and how many bytes, for a dry run."""

    @abstractmethod
    def work(self, wip: Path) -> Finished | None:
        """Do it inside `wip`, continuing whatever an earlier process left there; None where others have to finish it."""

    def prepare(self, wip: Path) -> None:
        """Lay out `wip`, before the work begins or goes on."""

    def tidy(self) -> None:
        """Remove from a finished folder what a kill may have left there."""

    def check_discard(self) -> None:
        """Refuse to discard, or to lay out in another way, unfinished work that others are at."""

    def waiting(self) -> Outcome:
        """What is said where others have to finish the work."""
        raise NotImplementedError

    def check(self) -> None:
        """Refuse faults of the settings, the task and the data before anything is written."""

    def resolved(self) -> dict[str, Any]:
        """What `auto` identity settings of this stage stand for, by dotted name."""
        return {}

    def extend(self, finished: Path, wip: Path) -> None:
        """Begin `wip` from a finished folder that does not go far enough."""

    def auto_threads(self) -> int:
        """The CPU threads that `auto` stands for."""
        return torch.get_num_threads()

    def content_inputs(self) -> dict[str, Any]:
        """Further content the result depends on."""
        return {}

    @property
    def folder(self) -> StageFolder:
        """Where the result lies."""
        return folder_of(self.project, self.name)

    def hold(self) -> contextlib.AbstractContextManager[None]:
        """Keep other processes off the stage."""
        return self.folder.lock()

    def gate(self) -> contextlib.AbstractContextManager[None]:
        """Where several processes may hold the stage: one at a time begins."""
        return contextlib.nullcontext()

    @property
    def joins(self) -> bool:
        """Whether this process goes on with what others have begun, even where it was to be redone."""
        return False

    @property
    def splits_read(self) -> dict[str, str]:
        """Which split stands for `input`."""
        return {}

    # What stages share.

    @property
    def spec(self) -> StageSpec:
        """The stage's place in the pipeline."""
        return spec_of(self.project, self.name)

    @property
    def settings(self) -> Any:
        """The stage's own table."""
        return self.project.settings.table(self.name)

    @property
    def fingerprint(self) -> str:
        """Of the work under way."""
        return self._begun["fingerprint"]

    def tell_total(self, total: int, unit: str) -> None:
        """Record how much there is to do, for `ocd status` while the work is under way."""
        self._begun["plan"] = {"total": total, "unit": unit}
        write_json(self.folder.wip / BEGUN, self._begun)

    def keep_execution(self, **resolved: Any) -> dict[str, Any]:
        """Execution settings as resolved now, or as the unfinished work was begun with: the same ones give the same bits."""
        kept = resolved | self._begun["execution"]
        if kept != self._begun["execution"] and (self.folder.wip / BEGUN).exists():
            write_json(self.folder.wip / BEGUN, self._begun | {"execution": kept})
        self._begun["execution"] = kept
        return kept

    def change_execution(self, **changed: Any) -> None:
        """Go on with other execution settings than the work was begun with, also after a kill."""
        self._begun["execution"] |= changed
        write_json(self.folder.wip / BEGUN, self._begun)

    def keep_threads(self, threads: int) -> None:
        """Work on as many threads as what is taken up was made with."""
        self._begun["threads"] = threads
        torch.set_num_threads(threads)
