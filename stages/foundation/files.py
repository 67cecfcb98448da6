"""Writing so that a file is either whole or absent, hashing, and paths that stay inside their folder."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from stages.foundation.errors import ArtifactError, TryAgainError

TEMPORARY = ".tmp"


def canonical_json(value: Any) -> str:
    """The one spelling of `value` that is hashed: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def digest(value: Any) -> str:
    """sha256 of `value`'s canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_folder(path: Path) -> None:
    """Make renames and new names in a folder survive a power cut, where folders can be opened: Windows refuses that."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A stream for a file that is either whole or absent: a temporary neighbour, fsync, rename. The new name itself may not
    survive a power cut."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}{TEMPORARY}")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_pieces(path: Path, *pieces: bytes) -> None:
    """Write a file whole, as `written_whole`."""
    with written_whole(path) as stream:
        stream.writelines(pieces)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole, and make its name durable, too."""
    write_pieces(path, data)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, whole."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ArtifactError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing") from error
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} is not readable as JSON: {error}", "ocd verify names what else is damaged") from error


def inside(folder: Path, name: str) -> Path:
    """The path of `name` under `folder`.

    Raises:
        ArtifactError: `name` is absolute, climbs out with `..`, or is a link that leads out.
    """
    parts = Path(name).parts
    places = [os.path.join(folder, *parts[: count + 1]) for count in range(len(parts))]  # noqa: PTH118 (asked of many files)
    leads_out = Path(name).is_absolute() or ".." in parts
    # Only a link on the way can lead elsewhere.
    if not leads_out and any(map(os.path.islink, places)):
        leads_out = not (folder / name).resolve().is_relative_to(folder.resolve())
    if leads_out:
        raise ArtifactError(f"{folder / 'manifest.json'} names {name!r}, which leads out of {folder}")
    return folder / name


def link_or_copy(source: Path, target: Path) -> None:
    """Give a finished, never rewritten file a second name; copy where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def strays(folder: Path) -> list[Path]:
    """What a kill may have left half-written in a stage's folder."""
    return [path for pattern in ("*.partial", "*.tmp") for path in folder.rglob(pattern)]


def sweep(folder: Path) -> None:
    """Remove that; not while another process may be writing."""
    for path in strays(folder):
        remove(path)


def remove(path: Path) -> None:
    """Delete a file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a folder that cannot be written into an error a user can act on.

    Raises:
        TryAgainError: no space is left, or the quota is used up.
        ArtifactError: the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(existing_parent(path)).free
            raise TryAgainError(
                f"the disk is full: {free:,} bytes are free at {path}", "make room, then run the same command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ArtifactError(
                f"{error.filename or path} cannot be written: {error.strerror}", "--run names another folder"
            ) from error
        raise


def existing_parent(path: Path) -> Path:
    """The nearest folder above (or at) `path` that exists."""
    while not path.exists():
        path = path.parent
    return path


def require_space(path: Path, needed: int) -> None:
    """Refuse beforehand what the free disk cannot hold.

    Raises:
        TryAgainError: fewer than `needed` bytes are free at `path`.
    """
    free = shutil.disk_usage(existing_parent(path)).free
    if needed > free:
        raise TryAgainError(
            f"not enough disk: up to {needed:,} bytes are needed at {path}, {free:,} are free",
            "make room, name another folder with --run, or take fewer samples with --set collect.samples=N",
        )


def available_memory() -> int | None:
    """Bytes of memory a process can still take, of the machine and of its container, or None where the system does not tell."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        # Files that are only cached give their memory back when it is asked for.
        cached = [line.split() for line in (group / "memory.stat").read_text().splitlines() if "active_file " in line]
        free = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        found.append(free + sum(int(count) for _, count in cached))
    return min(found, default=None)
