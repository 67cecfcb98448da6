"""The JSON records of a run directory as types, so that a foreign or hand-edited one gives one message with its field."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from stages.foundation.errors import ArtifactError
from stages.foundation.files import digest, read_json, write_json

FORMAT_VERSION = 2
REDO = "the stage must be redone with --force"


class Record(BaseModel):
    """A record on the disk: frozen, and closed to keys and types that are not its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    @classmethod
    def read(cls, path: Path) -> Self:
        """The record at `path`.

        Raises:
            ArtifactError: it is missing, no JSON, of another format version, lacks a field, or has one that cannot be.
        """
        raw = read_json(path)
        _check_version(raw, path)
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first, *others = error.errors()
            field = ".".join(map(str, first["loc"])) or "it"
            what = "is missing" if first["type"] == "missing" else f"is {first['input']!r:.80}: {first['msg'].lower()}"
            more = f" (and {len(others)} more problems)" if others else ""
            raise ArtifactError(f"{path}: {field} {what}{more}", REDO) from error

    def write(self, path: Path) -> None:
        write_json(path, self.as_json())

    def as_json(self) -> dict[str, Any]:
        """What the file holds: the fields that were given."""
        return self.model_dump(exclude_unset=True)

    def changed(self, **changed: Any) -> Self:
        return self.model_copy(update=changed)


def _check_version(raw: Any, path: Path) -> None:
    """Refuse a record of another format version before anything else of it is looked at."""
    for part in (raw, raw.get("identity") if isinstance(raw, dict) else None):
        if isinstance(part, dict) and part.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
            raise ArtifactError(
                f"{path} has format version {part['format_version']}, expected {FORMAT_VERSION}",
                "name another folder with --run",
            )


class Hashed(Record):
    """A record that says in `sha256` what all else in it hashes to."""

    sha256: str

    @classmethod
    def hashed(cls, **fields: Any) -> Self:
        """The record of these fields, with its hash."""
        bare = cls(**fields, sha256="")
        return bare.changed(sha256=bare.found_hash())

    def found_hash(self) -> str:
        """What it hashes to now."""
        return digest(self.model_dump(exclude_unset=True, exclude={"sha256"}))


class RunRecord(Record):
    """`run.json`: what the run directory is of."""

    format_version: int
    task: str
    seed: int


class Identity(Record):
    """Everything a result depends on; its digest is the fingerprint. Holds no time, host, path or version of a library."""

    format_version: int
    stage: str
    settings: dict[str, Any]
    inputs: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """sha256 of the identity's canonical JSON."""
        return digest(self.as_json())


class FileRecord(Record):
    """A file as it was when it was recorded."""

    size: int
    mtime_ns: int
    sha256: str


class SourceRecord(FileRecord):
    """A file of the user's that a stage depends on."""

    path: str


class Extent(Record):
    """How far a stage was asked to go, how far it went, and whether there is no further."""

    value: int | Literal["all"] | None
    reached: int
    exhausted: bool


class Total(Record):
    """How much there is to do, in "blocks" or "steps"."""

    total: int
    unit: str


class Begun(Record):
    """`begun.json`: what an unfinished folder was begun with.

    Attributes:
        identity, fingerprint: of the result.
        execution: execution settings as resolved; the same ones give the same bits.
        wanted: how far it is to go, by "stage.key".
        sources: the user's files.
    """

    identity: Identity
    fingerprint: str
    execution: dict[str, Any]
    threads: int
    wanted: dict[str, Any] = {}
    sources: dict[str, SourceRecord] = {}
    plan: Total | None = None


class ArrayDescription(Record):
    """An array of the delta store; one that is kept as two factors names them, and is described as the whole it stands for."""

    shape: list[int]
    dtype: str
    factors: list[str] | None = None


class StoreDescription(Record):
    """The delta store: rows, rows to a block, the arrays, and which of them are fields of the conditioning."""

    samples: int
    block_samples: int
    arrays: dict[str, ArrayDescription]
    fields: list[str]


class Made(Record):
    """When and with what a result was made; no part of its identity."""

    started: str
    ended: str
    device: str
    threads: int
    python: str
    versions: dict[str, str]


class Manifest(Hashed):
    """`manifest.json`, written last: what makes a finished folder trustworthy.

    `stage`, `identity` and `fingerprint` say what the result is; `extents`, `content`, `summary`, `store` and `chosen` are
    `WorkResult`'s; `execution` are settings as resolved; `files` are those of the folder but the log, by name.
    """

    stage: str
    identity: Identity
    fingerprint: str
    extents: dict[str, Extent]
    execution: dict[str, Any]
    content: str
    summary: dict[str, Any]
    sources: dict[str, SourceRecord]
    files: dict[str, FileRecord]
    made: Made
    store: StoreDescription | None = None
    chosen: dict[str, Any] = {}


class ChunkRecord(Record):
    """A file of a block."""

    bytes: int
    sha256: str


class BlockRecord(Hashed):
    """`blocks/000000.json`, written last: what makes a block done.

    Attributes:
        samples: first row, and the one after the last.
        chunks: its files by name.
        members: of the ensemble, for blocks of predictions.
        sums: of figures over its rows.
    """

    fingerprint: str
    block: int
    samples: list[int]
    chunks: dict[str, ChunkRecord]
    members: int | None = None
    sums: dict[str, float] = {}
    skipped: list[int] = []


class CheckpointRecord(Record):
    """`checkpoints/00000000.json`, written last: a checkpoint of a training, the best evaluation so far and the hash of its
    snapshot, the score that patience waits from and evaluations since, losses since the last evaluation, how much of the
    metrics was written by then; where the losses decide when tuning begins, after which step it did, and the last ones."""

    fingerprint: str
    step: int
    sha256: str
    best: dict[str, Any]
    best_sha256: str
    mark: float | None
    waited: int
    losses: list[float]
    metrics_bytes: int
    tuned_from: int | None = None
    losses_on_deltas: list[float] = []


class Candidate(Record):
    """A parameter that could be the layer, with its score (Eq. 6) where there is one."""

    name: str
    shape: list[int]
    score: float | None
    loss_spread: float | None = None
    rank: int | None = None
    rank_stability: float | None = None


class LayerChoice(Record):
    """`layer.json`: the chosen parameter, and every candidate."""

    layer: str
    shape: list[int]
    chosen_by: Literal["setting", "score"]
    candidates: list[Candidate]
