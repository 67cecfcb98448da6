"""Who works on a stage: one process alone, or several, each at its part of the blocks."""

import contextlib
from collections.abc import Callable, Iterator

from stages.foundation.errors import TryAgainError
from stages.foundation.files import sweep
from stages.foundation.progress import Report
from stages.run_directory.folders import StageFolder
from stages.run_directory.locks import WAIT, WHOLE, Part, gate, held, holders, lock_path
from stages.store.ledger import Ledger


class Holding:
    """A stage's folder, held by this process alone, or for one part of the blocks beside those who do others."""

    def __init__(self, folder: StageFolder, part: Part | None) -> None:
        self.folder, self.part = folder, part
        self._until_let_go = contextlib.ExitStack()

    @property
    def joins(self) -> bool:
        """Whether this process goes on with what other parts have begun, even where it was to be redone."""
        return self.part is not None

    @contextlib.contextmanager
    def held(self, tell: Callable[[str], None]) -> Iterator[None]:
        """Keep other processes off the stage, or off the part; `tell` hears of it where nothing can.

        Raises:
            TryAgainError: one of them is at it.
            SettingsError: a part, where the file system has no locks.
        """
        with self._until_let_go:
            self._until_let_go.enter_context(held(self.folder.run, self.folder.name, self.part or WHOLE, tell))
            yield

    def gate(self) -> contextlib.AbstractContextManager[None]:
        """Parts begin, and end, one after another."""
        if self.part is None:
            return contextlib.nullcontext()
        return gate(lock_path(self.folder.run, f"{self.folder.name}.gate"))

    def keep_gate(self) -> None:
        """Let no other part begin or end until this one is let go of."""
        self._until_let_go.enter_context(self.gate())

    def refuse_to_discard(self) -> None:
        """Before unfinished work is discarded, or laid out in another way.

        Raises:
            TryAgainError: other parts are at it.
        """
        if self.part in (None, WHOLE):
            return
        name = self.folder.name
        others = [text for text in holders(self.folder.run, name) if not text.endswith(f"(part {self.part})")]
        if others:
            raise TryAgainError(f"{name} was begun with other settings, and is in use by {'; '.join(others)}", WAIT)


class BlockShare:
    """The blocks of a ledger that are this process's, and which of them are yet to be done."""

    def __init__(self, ledger: Ledger, holding: Holding) -> None:
        self._ledger, self._holding = ledger, holding
        part = holding.part
        self._mine = [block for block in range(ledger.blocks) if part is None or part.has(block)]
        self.pending = ledger.pending(self._mine)

    @property
    def rows_left(self) -> int:
        """Rows of the blocks that are yet to be done."""
        return sum(len(self._ledger.block_range(block)) for block in self.pending)

    def look_again(self, report: Report, unit: str) -> int:
        """Hash what was there when this process came, outside the gate, for it may be much: what is damaged is done again.

        Returns:
            rows that are done.
        """
        ledger, found = self._ledger, set(self._mine) - set(self.pending)
        damaged = [block for block in sorted(found) if not ledger.is_done(block, rehash=True)]
        with self._holding.gate():
            self.pending += ledger.pending(damaged, rehash=True) if ledger.folder.exists() else []
        rows, left = sum(len(ledger.block_range(block)) for block in self._mine), self.rows_left
        if rows > left > 0:
            report.message(f"continues: {rows - left:,} of {rows:,} {unit} are there")
        return rows - left

    def is_whole(self) -> bool:
        """Whether no block is left to others. Until this process lets go of its part, no other one begins or ends then."""
        if not self._holding.joins:
            return True
        self._holding.keep_gate()
        ledger = self._ledger
        if not ledger.folder.exists() or any(not ledger.is_done(block) for block in range(ledger.blocks)):
            return False
        sweep(ledger.folder)
        return True
