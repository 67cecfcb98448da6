"""Data files of the examples: taken from `OCD_DATA`, else from a cache, else downloaded; with a checksum, the publisher's or
that of the first download."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.foundation.errors import DataError, SettingsError
from stages.foundation.files import sha256_file, write_bytes


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
        SettingsError: it has to be downloaded, and pooch is missing.
    """
    if (path := _given(name, sha256)) is not None:
        return path
    path = cache_folder() / name
    record = path.with_name(f"{path.name}.sha256")
    recorded = next(iter(record.read_text(errors="replace").split()), "nothing") if record.is_file() else None
    expected, found = sha256 or recorded, sha256_file(path) if path.is_file() else None
    if found and sha256 is None and found != (recorded or found):
        raise DataError(
            f"{path} has changed: its sha256 is {found[:12]}…, {expected[:12]}… was recorded when it was new",
            f"delete it and {record} to download it again",
        )
    if not found or found != (expected or found):
        hint = f"put the file at {path}, or its folder in OCD_DATA"
        if sha256 is None and recorded:
            hint += f"; where it may differ from an earlier download, delete {record}"
        _download(path, urls, expected, timeout_s, hint)
        found = sha256_file(path)
    if recorded != found and (sha256 is None or recorded):
        # As `sha256sum` writes it.
        write_bytes(record, f"{found}  {path.name}\n".encode())
    return path


def _given(name: str, sha256: str | None) -> Path | None:
    """The file in `OCD_DATA`, if it is there."""
    folder = os.environ.get("OCD_DATA")
    if not folder or not (path := Path(folder).expanduser() / name).is_file():
        return None
    if sha256 is not None and sha256_file(path) != sha256:
        raise DataError(
            f"{path} has another sha256 than expected ({sha256[:12]}…)", "replace the file, or unset OCD_DATA to download it"
        )
    return path


def _download(path: Path, urls: Sequence[str], sha256: str | None, timeout_s: float, hint: str) -> None:
    """Download to `path` from the first server that gives a whole file, of this checksum where there is one.

    Raises:
        DataError: none does.
    """
    pooch, problems = _pooch(), []
    downloader = pooch.HTTPDownloader(timeout=timeout_s)
    for url in urls:
        try:
            pooch.retrieve(url, sha256 and f"sha256:{sha256}", path.name, path.parent, downloader=downloader)
            return
        except (OSError, ValueError) as error:
            problems.append(f"  {url}: {error}")
    raise DataError(f"{path.relative_to(cache_folder())} could not be downloaded:\n" + "\n".join(problems), hint)


def _pooch() -> Any:
    # Whoever has the data need not have it.
    try:
        import pooch
    except ImportError as error:
        raise SettingsError("pooch, which downloads data, is not installed", 'pip install "torch-ocd[examples]"') from error
    # The library says nothing by itself.
    pooch.get_logger().setLevel("WARNING")
    return pooch
