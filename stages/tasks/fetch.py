"""Data files of the examples: taken from `OCD_DATA`, else from a cache, else downloaded; always with a checksum."""

import hashlib
import http.client
import os
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from stages.errors import DataError

_CHUNK = 1 << 20


def cache_folder() -> Path:
    """Where downloads are kept: `OCD_CACHE`, else `~/.cache/ocd`."""
    return Path(os.environ.get("OCD_CACHE") or Path.home() / ".cache" / "ocd")


def fetch(name: str, urls: Sequence[str], sha256: str, timeout_s: float = 60) -> Path:
    """The path of a data file.

    Args:
        name: its path under `OCD_DATA` and in the cache, such as "mnist/train-images-idx3-ubyte.gz".
        urls: where it can be downloaded, tried in order.
        sha256: of its bytes, in hexadecimal.
        timeout_s: seconds without an answer after which a server is given up.

    Raises:
        DataError: a file with another checksum in `OCD_DATA`, or no server that gives the right one.
    """
    if folder := os.environ.get("OCD_DATA"):
        path = Path(folder).expanduser() / name
        if path.is_file():
            if _sha256(path) != sha256:
                raise DataError(
                    f"{path} has another sha256 than expected ({sha256[:12]}…)",
                    "replace the file, or unset OCD_DATA to download it",
                )
            return path
    path = cache_folder() / name
    if path.is_file() and _sha256(path) == sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    problems = []
    for url in urls:
        problem = _download(url, path, sha256, timeout_s)
        if not problem:
            return path
        problems.append(f"  {url}: {problem}")
    raise DataError(
        f"{name} could not be downloaded:\n" + "\n".join(problems), f"put the file at {path}, or its folder in OCD_DATA"
    )


def _download(url: str, path: Path, sha256: str, timeout_s: float) -> str:
    """Download to `path` if the checksum is right; what is wrong otherwise, "" if nothing."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer, partial.open("wb") as stream:
            while chunk := answer.read(_CHUNK):
                stream.write(chunk)
        if (got := _sha256(partial)) != sha256:
            return f"sha256 {got[:12]}…, expected {sha256[:12]}…"
        os.replace(partial, path)
        return ""
    except (OSError, http.client.HTTPException, ValueError) as error:
        return str(error)
    finally:
        partial.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
