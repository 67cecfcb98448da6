"""A stage that several processes may work on, each at its part of the blocks."""

import contextlib
from collections.abc import Iterator

from stages.foundation.errors import TryAgainError
from stages.foundation.files import strays, sweep
from stages.foundation.progress import Report
from stages.lifecycle.outcome import Outcome
from stages.lifecycle.stage import Stage
from stages.run_directory.locks import WAIT, Part, gate, holders, lock_path, shared
from stages.run_directory.project import Project
from stages.run_directory.states import progress_of
from stages.store.ledger import Ledger


class SharedStage(Stage):
    """A stage of which this process does a part, or the whole.

    Args:
        project: the project.
        report: hears of its progress.
        part: "i/n", or None for the whole.
    """

    def __init__(self, project: Project, report: Report | None = None, *, part: str | None = None) -> None:
        super().__init__(project, report)
        self._part = Part.parse(part) if part is not None else None
        self._holding = contextlib.ExitStack()
        self._mine: list[int] = []
        self._pending: list[int] = []

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """The stage for this process alone, or together with other parts."""
        with self._holding:
            if self._part is None:
                self._holding.enter_context(self.folder.lock())
            else:
                self._holding.enter_context(shared(lock_path(self.folder.run, self.folder.name), self.folder.name, self._part))
            yield

    def gate(self) -> contextlib.AbstractContextManager[None]:
        """Parts begin one after another."""
        if self._part is None:
            return contextlib.nullcontext()
        return gate(lock_path(self.folder.run, f"{self.folder.name}.gate"))

    def tidy(self) -> None:
        """Temporary files of writers that were killed."""
        if not strays(self.folder.found):
            return
        with contextlib.suppress(TryAgainError), self.folder.lock():
            sweep(self.folder.found)

    def check_discard(self) -> None:
        """Refuse to discard, or to lay out in another way, what other parts are at."""
        found, name = holders(self.folder.run, self.folder.name), self.folder.name
        others = [text for text in found if not text.endswith(f"(part {self._part})")]
        if self._part and others:
            raise TryAgainError(f"{name} was begun with other settings, and is in use by {'; '.join(others)}", WAIT)

    def divide(self, ledger: Ledger) -> None:
        """Find which blocks are this process's, and which of them are yet to be done."""
        self._mine = [block for block in range(ledger.blocks) if self._part is None or self._part.has(block)]
        self._pending = ledger.pending(self._mine)

    def look_again(self, ledger: Ledger, unit: str) -> int:
        """Hash what was there when this process came, outside the gate, for it may be much: what is damaged is done again.

        Returns:
            rows that are done.
        """
        found = set(self._mine) - set(self._pending)
        damaged = [block for block in sorted(found) if not ledger.is_done(block, rehash=True)]
        with self.gate():
            self._pending += ledger.pending(damaged, rehash=True) if ledger.folder.exists() else []
        rows, left = (sum(len(ledger.block_range(block)) for block in blocks) for blocks in (self._mine, self._pending))
        if rows > left > 0:
            self.report.message(f"continues: {rows - left:,} of {rows:,} {unit} are there")
        return rows - left

    def is_whole(self, ledger: Ledger) -> bool:
        """Whether no block is left to others. Until this process lets go of its part, no other one begins or ends then."""
        if self._part is None:
            return True
        self._holding.enter_context(self.gate())
        if not ledger.folder.exists() or any(not ledger.is_done(block) for block in range(ledger.blocks)):
            return False
        sweep(ledger.folder)
        return True

    @property
    def joins(self) -> bool:
        """Parts join work that another part has begun."""
        return self._part is not None

    def waiting(self) -> Outcome:
        """This part is done; the store is whole already, or waits for other parts."""
        manifest = self.folder.manifest() if not self.folder.wip.exists() else None
        if manifest is not None:
            return Outcome(self.name, manifest["summary"], path=self.folder.path)
        progress = progress_of(self.folder)
        return Outcome(self.name, {"stage": self.name, "state": "partial", "part": str(self._part), **progress}, waits=True)
