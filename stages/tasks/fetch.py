"""Data files of the examples: taken from `OCD_DATA`, else from a cache, else downloaded; with a checksum, the publisher's or
that of the first download."""

import hashlib
import http.client
import os
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from stages.foundation.errors import DataError

_CHUNK = 1 << 20


def cache_folder() -> Path:
    """Where downloads are kept: `OCD_CACHE`, else `~/.cache/ocd`."""
    return Path(os.environ.get("OCD_CACHE") or Path.home() / ".cache" / "ocd")


def fetch(name: str, urls: Sequence[str], sha256: str | None, timeout_s: float = 60) -> Path:
    """The path of a data file.

    Args:
        name: its path under `OCD_DATA` and in the cache, such as "mnist/train-images-idx3-ubyte.gz".
        urls: where it can be downloaded, tried in order.
        sha256: of its bytes, in hexadecimal. None, where the publisher names none: a file in `OCD_DATA` is taken as it is,
            the first download's checksum is kept in the cache beside it, and every later use must match that one.
        timeout_s: seconds without an answer after which a server is given up.

    Raises:
        DataError: a file with another checksum in `OCD_DATA`, one in the cache that is not the recorded one any more, or no
            server that gives the right one.
    """
    if folder := os.environ.get("OCD_DATA"):
        path = Path(folder).expanduser() / name
        if path.is_file():
            if sha256 is not None and _sha256(path) != sha256:
                raise DataError(
                    f"{path} has another sha256 than expected ({sha256[:12]}…)",
                    "replace the file, or unset OCD_DATA to download it",
                )
            return path
    path = cache_folder() / name
    if path.is_file() and _is_right(path, sha256):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    problems = []
    for url in urls:
        problem = _download(url, path, sha256, timeout_s)
        if not problem:
            return path
        problems.append(f"  {url}: {problem}")
    hint = f"put the file at {path}, or its folder in OCD_DATA"
    if sha256 is None and _record(path).is_file():
        hint += f"; where it may differ from an earlier download, delete {_record(path)}"
    raise DataError(f"{name} could not be downloaded:\n" + "\n".join(problems), hint)


def _is_right(path: Path, sha256: str | None) -> bool:
    """Whether a file in the cache has its checksum; without one, the recorded one is demanded, or recorded now."""
    found = _sha256(path)
    if sha256 is not None:
        return found == sha256
    recorded = _recorded(path)
    if recorded is None:
        _write_record(path, found)
    elif found != recorded:
        raise DataError(
            f"{path} has changed: its sha256 is {found[:12]}…, {recorded[:12]}… was recorded when it was new",
            f"delete it and {_record(path)} to download it again",
        )
    return True


def _download(url: str, path: Path, sha256: str | None, timeout_s: float) -> str:
    """Download to `path` if length and checksum are right; what is wrong otherwise, "" if nothing."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer, partial.open("wb") as stream:
            while chunk := answer.read(_CHUNK):
                stream.write(chunk)
            length = answer.headers.get("Content-Length")
        if length is not None and partial.stat().st_size != int(length):
            return f"broke off after {partial.stat().st_size:,} of {int(length):,} bytes"
        got, recorded = _sha256(partial), _recorded(path)
        expected = sha256 or recorded or got
        if got != expected:
            return f"sha256 {got[:12]}…, expected {expected[:12]}…"
        if got != recorded and (sha256 is None or recorded is not None):
            _write_record(path, got)
        os.replace(partial, path)
        return ""
    except (OSError, http.client.HTTPException, ValueError) as error:
        return str(error)
    finally:
        partial.unlink(missing_ok=True)


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _recorded(path: Path) -> str | None:
    """The checksum recorded beside a file of the cache, None if none is."""
    if not _record(path).is_file():
        return None
    return next(iter(_record(path).read_text(errors="replace").split()), "nothing")


def _write_record(path: Path, sha256: str) -> None:
    """Record a checksum as `sha256sum` writes it."""
    partial = path.with_name(f"{path.name}.sha256.{os.getpid()}.tmp")
    partial.write_text(f"{sha256}  {path.name}\n")
    os.replace(partial, _record(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
