"""What a stage's result depends on, as content hashes: the user's files and code, and the content of earlier stages."""

import ast
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.foundation.errors import DataError, TaskError
from stages.foundation.files import sha256_file
from stages.foundation.specs import is_code, module_file
from stages.foundation.weights import SETTING_HINT, weight_files
from stages.run_directory.format import Begun, Manifest, SourceRecord
from stages.run_directory.pipeline import Query, StageSpec
from stages.run_directory.project import Project

DATA_ROLES = ("train", "validation", "test")


def code_files(project: Project) -> list[Path]:
    """The user's module files that the task names."""
    task = project.settings.task
    specs = (task.class_, task.model, task.loss, task.train, task.test, task.validation)
    modules = {spec.split(":")[0] for spec in specs if spec and is_code(spec)}
    return sorted(path for name in modules if (path := module_file(project.root, name)))


def hash_code(path: Path) -> str:
    """sha256 of what a Python file says, whatever its comments and layout, which change no result.

    Raises:
        TaskError: the file is not Python.
    """
    try:
        said = ast.unparse(ast.parse(path.read_bytes()))
    except (SyntaxError, ValueError) as error:
        fault = f", line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else f": {error}"
        raise TaskError(f"{path} is not valid Python{fault}", "mend it, then run the same command again") from error
    return hashlib.sha256(said.encode()).hexdigest()


def source_record(
    path: Path,
    recorded: SourceRecord | None = None,
    hasher: Callable[[Path], str] = sha256_file,
    hint: str = "ocd.toml names it under [task]; relative paths start at its folder",
) -> SourceRecord:
    """Size, time and hash of a source file; the hash is taken from `recorded` while size and time are the same.

    Raises:
        DataError: the file is missing.
    """
    try:
        info = path.stat()
    except OSError as error:
        raise DataError(f"{path} is missing", hint) from error
    if path.is_dir():
        raise DataError(f"{path} is a folder, expected a file", hint)
    same = recorded and recorded.size == info.st_size and recorded.mtime_ns == info.st_mtime_ns
    sha256 = recorded.sha256 if same else hasher(path)
    return SourceRecord(path=str(path), size=info.st_size, mtime_ns=info.st_mtime_ns, sha256=sha256)


def data_path(project: Project, role: str) -> Path | None:
    """The file a data role or `weights` names, or None where it is code or not set."""
    spec = getattr(project.settings.task, role)
    if spec is None or (role in DATA_ROLES and is_code(spec)):
        return None
    return project.root / Path(spec).expanduser()


def encoder_weights(project: Project) -> Path | None:
    """The file of weights that encoders of the conditioning begin with."""
    given = project.settings.train_diffusion.encoder_weights
    return None if given is None else project.root / Path(given).expanduser()


def encoder_sources(project: Project, recorded: Begun | Manifest | None) -> dict[str, SourceRecord]:
    """The records of the files that `[train-diffusion]` names.

    Raises:
        DataError, TaskError: as `task_sources`.
    """
    known = recorded.sources if recorded else {}
    sources: dict[str, SourceRecord] = {}
    if path := encoder_weights(project):
        hint = "train-diffusion.encoder_weights names it; relative paths start at the folder of ocd.toml"
        sources["encoder weights"] = source_record(path, known.get("encoder weights"), hint=hint)
    specs = project.settings.train_diffusion.encoders.values()
    for module in sorted({spec.split(":")[0] for spec in specs if is_code(spec)}):
        if path := module_file(project.root, module):
            name = f"encoder code {path.relative_to(project.root)}"
            sources[name] = source_record(path, known.get(name), hash_code)
    return sources


def inputs_of(
    project: Project,
    spec: StageSpec,
    query: Query | None,
    upstream: dict[str, str],
    *,
    recorded: Begun | Manifest | None,
    hash_dataset: Callable[[str], str | None] | None,
) -> tuple[dict[str, Any], dict[str, SourceRecord]]:
    """The content hashes of all that a stage reads, `upstream` being those of earlier stages, and the records of the user's
    files among them; `recorded` and `hash_dataset` as `task_sources`."""
    of_query = {query.split} - {""} if query else set()
    roles = tuple(role for role in (*DATA_ROLES, "weights") if role in of_query or role in spec.data)
    hashes, sources = task_sources(project, roles, recorded, hash_dataset) if spec.task else ({}, {})
    if spec.name == "train-diffusion":
        sources |= encoder_sources(project, recorded)
    hashes |= {name: record.sha256 for name, record in sources.items()} | upstream
    return hashes if query is None else hashes | {"query": query.content}, sources


def weight_sources(path: Path | None, known: dict[str, SourceRecord]) -> dict[str, SourceRecord]:
    """The records of the files that imported weights lie in; `path` is None where a flag named them, which later commands do
    not repeat: what was imported is in the base, wherever the files are now.

    Raises:
        DataError: a file is missing.
    """
    if path is not None:
        names = {"weights" if place == 0 else f"weights {file.name}": file for place, file in enumerate(weight_files(path))}
        return {name: source_record(file, known.get(name), hint=SETTING_HINT) for name, file in names.items()}
    given = {name: record for name, record in known.items() if name.split(" ")[0] == "weights"}
    files = {name: Path(record.path) for name, record in given.items()}
    return {name: source_record(files[name], record) if files[name].exists() else record for name, record in given.items()}


def task_sources(
    project: Project,
    roles: tuple[str, ...],
    recorded: Begun | Manifest | None,
    hash_dataset: Callable[[str], str | None] | None,
) -> tuple[dict[str, str], dict[str, SourceRecord]]:
    """The content hashes of the task's data that only code can load, and the records of its files: data and code.

    Args:
        roles: of train, validation, test, weights, and `input` with a path given in `recorded` alone.
        recorded: what an earlier run of the stage left; its hashes stand for files of the same size and time, for
            imported weights given by a flag, and, without `hash_dataset`, for data that only code can load.
        hash_dataset: the identity of a dataset that code loads; None to trust `recorded`.

    Raises:
        DataError, TaskError: a file is missing, code is not Python.
    """
    known = recorded.sources if recorded else {}
    inputs = recorded.identity.inputs if recorded else {}
    hashes: dict[str, str] = {}
    sources: dict[str, SourceRecord] = {}
    for path in code_files(project):
        name = f"code {path.relative_to(project.root)}"
        sources[name] = source_record(path, known.get(name), hash_code)
    for role in roles:
        path = data_path(project, role) if hasattr(project.settings.task, role) else None
        if role == "weights":
            sources |= weight_sources(path, known)
        elif path is not None:
            sources[role] = source_record(path, known.get(role))
        elif role in DATA_ROLES:
            value = hash_dataset(role) if hash_dataset else inputs.get(role)
            if value is not None:
                hashes[role] = value
            if spec := getattr(project.settings.task, role):
                hashes[f"{role} by"] = spec
    return hashes, sources
