"""Work done block by block with a ledger: a block is done when its record exists, which is written last and holds the hash of
every file of the block."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stages.foundation.errors import ArtifactError, OcdError
from stages.foundation.files import inside, remove, sha256_file
from stages.run_directory.format import BlockRecord, ChunkRecord

LEDGER = "blocks"


class Ledger:
    """Rows in blocks, with the records of those that are done at `folder`/blocks; a subclass names and writes their files.

    Args:
        folder: the stage's folder.
        samples: rows.
        rows: rows to a block.
        fingerprint: of the stage; blocks of another do not count.
        marks: further entries that a block's record must have to count.
    """

    def __init__(self, folder: Path, samples: int, rows: int, fingerprint: str, **marks: Any) -> None:
        self.folder, self.samples, self.rows, self.fingerprint = folder, samples, rows, fingerprint
        self.marks = {"fingerprint": fingerprint, **marks}

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.samples // self.rows)

    def block_range(self, block: int) -> range:
        """The rows of a block."""
        return range(block * self.rows, min(self.samples, (block + 1) * self.rows))

    def chunk_names(self, block: int) -> list[str]:
        """The files of a block, relative to the stage's folder."""
        raise NotImplementedError

    def record_path(self, block: int) -> Path:
        """The ledger's record of a block."""
        return self.folder / LEDGER / f"{block:06d}.json"

    def is_done(self, block: int, *, rehash: bool = False) -> bool:
        """Whether a block's record exists, is of this stage and range, and its chunks have the sizes (and hashes) it says."""
        if not self.record_path(block).exists():
            return False
        try:
            record = BlockRecord.read(self.record_path(block))
            span = self.block_range(block)
            wanted = (self.marks, [span.start, span.stop], record.found_hash(), set(self.chunk_names(block)))
            marks = {key: getattr(record, key) for key in self.marks}
            if (marks, record.samples, record.sha256, set(record.chunks)) != wanted:
                return False
            return not any(damage_of(self.folder, name, chunk, rehash) for name, chunk in record.chunks.items())
        except (ArtifactError, OSError):
            return False

    @property
    def records(self) -> int:
        """Blocks that the ledger has a record of."""
        return len(list((self.folder / LEDGER).glob("*.json")))

    def pending(self, blocks: Iterable[int] | None = None, *, rehash: bool = False) -> list[int]:
        """Those of the blocks (by default all) that are not done; their records, if any, are removed."""
        found = []
        for block in range(self.blocks) if blocks is None else blocks:
            if not self.is_done(block, rehash=rehash):
                remove(self.record_path(block))
                found.append(block)
        return found

    def trim(self) -> None:
        """Remove records past the end, or of other names."""
        for path in (self.folder / LEDGER).glob("*.json"):
            if not path.stem.isdigit() or int(path.stem) >= self.blocks:
                remove(path)

    def write_record(self, block: int, chunks: dict[str, ChunkRecord], **notes: Any) -> None:
        """Write the record that makes a block done.

        Args:
            block: its number.
            chunks: size and hash of each of its files, by name.
            notes: further entries.
        """
        span = self.block_range(block)
        record = BlockRecord.hashed(**self.marks, block=block, samples=[span.start, span.stop], chunks=chunks, **notes)
        record.write(self.record_path(block))


def damage_of(folder: Path, name: str, chunk: ChunkRecord, rehash: bool = True) -> str:
    """What is wrong with a chunk; "" where nothing is."""
    path = inside(folder, name)
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != chunk.bytes:
        return f"{name} has {size:,} bytes, expected {chunk.bytes:,}"
    return f"content changed: {name}" if rehash and sha256_file(path) != chunk.sha256 else ""


def ledger_problems(folder: Path, fingerprint: str) -> list[str]:
    """Hash every chunk of a store again and compare with its ledger; what is wrong, a line each.

    Args:
        folder: the stage's folder, finished or not.
        fingerprint: of the stage.
    """
    problems = []
    for path in sorted((folder / LEDGER).glob("*.json")):
        try:
            record = BlockRecord.read(path)
            if record.fingerprint != fingerprint:
                problems.append(f"{LEDGER}/{path.name} is of another store")
            if record.sha256 != record.found_hash() or path.stem != f"{record.block:06d}":
                problems.append(f"content changed: {LEDGER}/{path.name}")
            found = (damage_of(folder, name, chunk) for name, chunk in record.chunks.items())
            problems += [f"block {path.stem}: {text}" for text in found if text]
        except (OcdError, OSError) as error:
            problems.append(f"{LEDGER}/{path.name} is not a block's record: {error}")
    return problems
