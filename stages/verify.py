"""verify: hash every artifact again and compare with the manifests and the ledgers of blocks."""

from pathlib import Path
from typing import Any

from stages.foundation.errors import ArtifactError, OcdError
from stages.foundation.progress import Report, Silent
from stages.lifecycle.branches import BRANCHES
from stages.run_directory.folders import StageFolder, check_run, damaged_files
from stages.run_directory.format import BlockRecord, Manifest
from stages.run_directory.pipeline import ORDER
from stages.run_directory.project import Project
from stages.store.ledger import ledger_problems


def verify(project: Project, *, report: Report | None = None) -> dict[str, Any]:
    """Re-hash every file the manifests name.

    Returns:
        {"stages": {name: {"files", "bytes", "problems": [text]}}, "whole": bool}.

    Raises:
        ArtifactError: the run directory is another task's, or there is none.
    """
    report = report or Silent()
    check_run(project)
    if not project.run_path.is_dir():
        raise ArtifactError(f"there is no run directory at {project.run_path}", "make one with: ocd run")
    folders = {folder.name: folder for folder in _folders(project.run_path)}
    for branch in sorted((project.run_path / BRANCHES).glob("*")):
        folders |= {f"{BRANCHES}/{branch.name}/{folder.name}": folder for folder in _folders(branch)}
    found = {}
    for number, (name, folder) in enumerate(folders.items()):
        found[name] = _check(folder)
        report.progress(number + 1, len(folders), "folders")
    unfinished = sorted({path.name.removesuffix(".wip") for path in (project.run_path / "infer").glob("*")})
    for name in ("collect", *(f"infer/{name}" for name in unfinished)):
        folder = StageFolder(project.run_path, name)
        found[f"{folder.name}.wip"] = _check_unfinished(folder)
    found = {name: entry for name, entry in found.items() if entry is not None}
    return {"stages": found, "whole": not any(entry["problems"] for entry in found.values())}


def _folders(run: Path) -> list[StageFolder]:
    """Where the stages of a run or a branch leave their results, one for each answer of `infer`."""
    answers = [path for path in sorted((run / "infer").glob("*")) if path.is_dir() and path.suffix == ""]
    names = [name for name in ORDER if name != "infer"] + [f"infer/{path.name}" for path in answers]
    return [StageFolder(run, name) for name in names]


def _check(folder: StageFolder) -> dict[str, Any] | None:
    try:
        manifest = folder.manifest()
    except OcdError as error:
        return {"files": 0, "bytes": 0, "problems": [error.message]}
    if manifest is None:
        return None
    path = folder.found
    problems = damaged_files(path, manifest, rehash=True)
    if manifest.identity.fingerprint != manifest.fingerprint:
        problems.append(f"{folder.name}/manifest.json does not match its fingerprint")
    if manifest.found_hash() != manifest.sha256:
        problems.append(f"content changed: {folder.name}/manifest.json")
    named = set(manifest.files) | {"manifest.json", "log.txt", "begun.json"}
    extra = sorted(entry.relative_to(path).as_posix() for entry in path.rglob("*") if entry.is_file())
    problems += [f"{folder.name}/{name} is not in the manifest" for name in extra if name not in named]
    problems += _check_ledger(path, manifest)
    return {"files": len(manifest.files), "bytes": sum(file.size for file in manifest.files.values()), "problems": problems}


def _check_ledger(path: Path, manifest: Manifest) -> list[str]:
    """Each block's record names this stage and the chunk hashes the manifest has."""
    problems = []
    for name in sorted(file for file in manifest.files if file.startswith("blocks/")):
        try:
            record = BlockRecord.read(path / name)
            if record.fingerprint != manifest.fingerprint:
                problems.append(f"{name} is of another store")
            problems += [
                f"{name} and the manifest disagree about {file}"
                for file, chunk in record.chunks.items()
                if file not in manifest.files or manifest.files[file].sha256 != chunk.sha256
            ]
        except OcdError as error:
            problems.append(f"{name} is not a block's record: {error}")
    return problems


def _check_unfinished(folder: StageFolder) -> dict[str, Any] | None:
    """The blocks of an unfinished store or answer against their ledger."""
    records = list((folder.wip / "blocks").glob("*.json"))
    begun = folder.begun() if records else None
    if begun is None:
        return None
    problems = ledger_problems(folder.wip, begun.fingerprint)
    files = [path for path in (folder.wip / "deltas.zarr").rglob("c.*") if path.is_file()]
    files += (folder.wip / "blocks").glob("*.npz")
    return {"files": len(files), "bytes": sum(path.stat().st_size for path in files), "problems": problems}
