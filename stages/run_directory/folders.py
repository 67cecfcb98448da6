"""The run directory: one folder a stage, final names only for what is finished, and a lock for each stage."""

import contextlib
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from stages.foundation.errors import ArtifactError
from stages.foundation.files import digest, disk_errors, inside, remove, sha256_file, sync_folder
from stages.run_directory.format import FORMAT_VERSION, Begun, FileRecord, Manifest, RunRecord
from stages.run_directory.locks import held
from stages.run_directory.pipeline import AUTO, OWN_ROW
from stages.run_directory.project import Project

# Of a row's name in that of a folder.
LONGEST_NAME = 60
MANIFEST, BEGUN, RUN_FILE = "manifest.json", "begun.json", "run.json"


@dataclass(frozen=True)
class StageFolder:
    """The places of one stage: `path` once finished, `wip` while it works, `old` for the moment of the exchange."""

    run: Path
    name: str

    @property
    def path(self) -> Path:
        return self.run / self.name

    @property
    def _place(self) -> Path:
        """Where it really lies: a link to another disk stays one, and the work is done and exchanged beside its target."""
        return self.path.resolve() if self.path.is_symlink() else self.path

    @property
    def found(self) -> Path:
        """Where the finished files lie now: a lone `.old` folder stands for the finished one until it gets its name back."""
        return self.old if self.old.exists() and not self.path.exists() else self.path

    @property
    def wip(self) -> Path:
        return self._place.with_name(f"{self._place.name}.wip")

    @property
    def old(self) -> Path:
        """The finished folder's name while a new one takes its place."""
        return self._place.with_name(f"{self._place.name}.old")

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Hold the stage for this process alone; the lock dies with it.

        Raises:
            TryAgainError: another process holds it.
        """
        return held(self.run, self.name)

    def check_links(self) -> None:
        """Refuse a folder that is a link to nowhere, or holds links that lead out of it.

        Raises:
            ArtifactError: with the link, and what to type.
        """
        folder = self.found
        check_link(folder)
        for link in folder.iterdir() if folder.is_dir() else ():
            target = link.resolve()
            if link.is_symlink() and not target.is_relative_to(folder.resolve()):
                whole = target.with_name(f"{target.name}.{folder.name}")
                steps = ("rm", link), ("mv", folder, whole), ("mv", target, whole / link.name), ("ln -s", whole, folder)
                commands = " && ".join(" ".join([word, *(shlex.quote(str(path)) for path in paths)]) for word, *paths in steps)
                raise ArtifactError(
                    f"{link} leads out of {folder}, to {target}: a stage's folder may be a link, what lies in it may not",
                    f"delete the link, or keep its data there with the whole folder: {commands}",
                )

    def restore(self) -> None:
        """Give a lone `.old` folder its name back; one beside its successor is deleted."""
        if self.old.exists() and not self.path.exists():
            os.rename(self.old, self._place)
        elif self.old.exists():
            remove(self.old)

    def manifest(self) -> Manifest | None:
        """The finished folder's manifest, or None where the stage has not finished.

        Raises:
            ArtifactError: it is unreadable, of another format version, or names paths outside its folder; as `check_links`.
        """
        self.check_links()
        folder = self.found
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return None
        manifest = Manifest.read(folder / MANIFEST)
        for name in manifest.files:
            inside(folder, name)
        return manifest

    def begun(self) -> Begun | None:
        """The record an unfinished folder was begun with, or None where there is none. Where a kill came between the manifest
        and the exchange of the folders, the manifest stands for it.

        Raises:
            ArtifactError: it is unreadable, or of another format version.
        """
        if (self.wip / BEGUN).exists():
            return Begun.read(self.wip / BEGUN)
        if not (self.wip / MANIFEST).exists():
            return None
        whole = Manifest.read(self.wip / MANIFEST)
        kept = {name: getattr(whole, name) for name in ("identity", "fingerprint", "execution", "sources")}
        return Begun(**kept, threads=whole.made.threads)

    def exchange(self) -> None:
        """Give the finished work its final name: the old folder steps aside until the new one stands."""
        remove(self.wip / BEGUN)
        sync_folder(self.wip)
        remove(self.old)
        if self._place.exists():
            os.rename(self._place, self.old)
        os.rename(self.wip, self._place)
        sync_folder(self._place.parent)
        remove(self.old)


def folder_of(project: Project, stage: str, name: str = "test") -> StageFolder:
    """The folder of a stage; `name` tells apart the queries of `infer`."""
    return StageFolder(project.run_path, f"infer/{name}{_how(project)}" if stage == "infer" else stage)


def _how(project: Project) -> str:
    """What the name of an answer ends in that another row of `evaluate` gives, or the strength it fitted: it does not take the
    place of the plain one. No file's stem holds a plus sign, as `infer` spells it."""
    infer = project.settings.infer
    if infer.row == AUTO:
        return "+row-auto"
    if infer.row != OWN_ROW:
        return f"+{_spelled(infer.row)}"
    return "+strength-auto" if infer.strength == AUTO else ""


def _spelled(name: str) -> str:
    """A row's name as part of a file's: words joined by hyphens, and, where that could be another name's, a few digits."""
    spelled = re.sub(r"[^\w-]+", "-", name.replace("'", "")).strip("-")[:LONGEST_NAME]
    plain = spelled.replace("-", " ") == name.replace("'", "") and spelled not in ("", "row-auto", "strength-auto")
    return spelled if plain else f"{spelled}-{digest(name)[:6]}".lstrip("-")


def task_name(project: Project) -> str:
    """What `run.json` calls the task: its class, or its model."""
    return project.settings.task.class_ or project.settings.task.model or ""


def check_link(path: Path) -> None:
    """Refuse a link that leads nowhere: its disk may not be mounted.

    Raises:
        ArtifactError: naming link and target.
    """
    if path.is_symlink() and not path.exists():
        raise ArtifactError(
            f"{path} is a link to {path.resolve()}, which does not exist",
            f"mount its disk, or make the folder: mkdir -p {shlex.quote(str(path.resolve()))}",
        )


def check_run(project: Project) -> None:
    """Refuse a run directory that belongs to something else; one that does not exist yet is fine.

    Raises:
        ArtifactError: it is of another task or format version, or is a folder of other things.
    """
    path = project.run_path / RUN_FILE
    check_link(project.run_path)
    if not path.exists():
        if project.run_path.is_file():
            raise ArtifactError(f"{project.run_path} is a file, expected a folder", "name another with --run")
        if foreign := sorted(entry.name for entry in project.run_path.glob("*") if entry.name != ".locks"):
            raise ArtifactError(
                f"{project.run_path} is not a run directory: it has {foreign[0]} but no {RUN_FILE}",
                "name another folder with --run",
            )
        return
    record = RunRecord.read(path)
    if record.task != task_name(project):
        raise ArtifactError(
            f"{project.run_path} belongs to task {record.task!r}, but {project.config_path} is about {task_name(project)!r}",
            "name another folder with --run",
        )


def prepare_run(project: Project) -> None:
    """Make the run directory, or check the one that is there.

    Raises:
        ArtifactError: as `check_run`.
    """
    with disk_errors(project.run_path):
        check_run(project)
        project.run_path.mkdir(parents=True, exist_ok=True)
        record = RunRecord(format_version=FORMAT_VERSION, task=task_name(project), seed=project.seed)
        path = project.run_path / RUN_FILE
        if not path.exists() or RunRecord.read(path) != record:
            record.write(path)


def checked_file(folder: StageFolder, manifest: Manifest, name: str) -> Path:
    """A finished file that is about to be read, hashed again: its size and time do not show all damage.

    Raises:
        ArtifactError: it is missing, or its content changed.
    """
    record, stage = manifest.files.get(name), folder.name.split("/")[0]
    if record is None or not (folder.found / name).is_file() or sha256_file(folder.found / name) != record.sha256:
        raise ArtifactError(f"content changed: {folder.name}/{name}", f"redo it with: ocd {stage} --force")
    return folder.found / name


def file_records(folder: Path, hashes: dict[str, str], scratch: tuple[str, ...] = ()) -> dict[str, FileRecord]:
    """Size, time and sha256 of every file of a stage's folder but its log, records of its own state and what lies in `scratch`;
    those in `hashes` were hashed when they were written."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name.split("/")[0] not in (MANIFEST, BEGUN, "log.txt", *scratch):
            info = path.stat()
            sha256 = hashes.get(name) or sha256_file(path)
            found[name] = FileRecord(size=info.st_size, mtime_ns=info.st_mtime_ns, sha256=sha256)
    return found


def damaged_files(folder: Path, manifest: Manifest, *, rehash: bool) -> list[str]:
    """What is wrong with a finished folder's files, one line each; unless `rehash`, only files whose size or time differ
    from the manifest are hashed again. A file found damaged gets another time."""
    wrong = []
    for name, record in manifest.files.items():
        path = inside(folder, name)
        if not path.is_file():
            wrong.append(f"{folder.name}/{name} is missing")
            continue
        info = path.stat()
        if not rehash and info.st_size == record.size and info.st_mtime_ns == record.mtime_ns:
            continue
        if info.st_size != record.size:
            wrong.append(f"content changed: {folder.name}/{name} has {info.st_size:,} bytes, expected {record.size:,}")
        elif sha256_file(path) != record.sha256:
            wrong.append(f"content changed: {folder.name}/{name}")
            if info.st_mtime_ns == record.mtime_ns:
                # Nobody wrote it: the disk lost it. With another time, every later look at it sees what this one saw.
                with contextlib.suppress(OSError):
                    os.utime(path)
    return wrong
