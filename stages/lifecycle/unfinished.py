"""A stage's work on its way: the unfinished folder, and the record it was begun with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.foundation.threads import set_threads
from stages.run_directory.folders import BEGUN
from stages.run_directory.format import Begun, Total


@dataclass
class Unfinished:
    """Work under way in `X.wip`, and what it was begun with, which is written once the work has been laid out."""

    path: Path
    begun: Begun

    @property
    def fingerprint(self) -> str:
        return self.begun.fingerprint

    @property
    def execution(self) -> dict[str, Any]:
        """The execution settings it goes by."""
        return self.begun.execution

    def write(self) -> None:
        """Write the record: from now on the same command continues this work."""
        self.begun.write(self.path / BEGUN)

    def keep_execution(self, **resolved: Any) -> dict[str, Any]:
        """Execution settings as resolved now, or as the work was begun with: the same ones give the same bits."""
        self.begun = self.begun.changed(execution=resolved | self.execution)
        return self.execution

    def change_execution(self, **changed: Any) -> None:
        """Go on with other execution settings than the work was begun with, also after a kill."""
        self.begun = self.begun.changed(execution=self.execution | changed)
        self.write()

    def forget_execution(self) -> None:
        """Resolve all of them anew."""
        self.begun = self.begun.changed(execution={})

    def keep_threads(self, threads: int) -> None:
        """Work on as many threads as what is taken up was made with."""
        self.begun = self.begun.changed(threads=threads)
        set_threads(threads)

    def tell_total(self, total: int, unit: str) -> None:
        """Record how much there is to do, for `ocd status` while the work is under way."""
        self.begun = self.begun.changed(plan=Total(total=total, unit=unit))
