"""Settings written into a user's `ocd.toml`, with everything else in it as it was."""

import contextlib
import copy
import errno
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.foundation.errors import ArtifactError, SettingsError
from stages.foundation.files import disk_errors, write_bytes
from stages.run_directory.project import as_flags, check_settings, overridden


def require_writable(path: Path) -> None:
    """Refuse beforehand a settings file that cannot be replaced.

    Raises:
        SettingsError: it, or its folder, is read-only.
    """
    with _refused("make it writable, or leave out --write"):
        _check_writable(path.resolve())


def _check_writable(path: Path) -> None:
    for place in (path, path.parent):
        if not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))


def write_settings(path: Path, values: Mapping[str, Any]) -> None:
    """Put settings into a file: a key where it stands, in a commented line or in its table, a table only where there is none.

    Args:
        path: `ocd.toml`; it is replaced whole, or stays as it is.
        values: "table.key" to value.

    Raises:
        SettingsError: the file cannot be read, changed or written, or is not valid with these settings.
        TryAgainError: the disk is full.
    """
    # A link stays one.
    path = path.resolve()
    with _refused(_by_flags(values)):
        old, mode = path.read_bytes().decode(), path.stat().st_mode
        new = edited(old, values, str(path))
        _check_writable(path)
        with disk_errors(path):
            write_bytes(path, new.encode())
            path.chmod(mode)


def edited(text: str, values: Mapping[str, Any], source: str) -> str:
    """The text of a settings file with settings put in; `source` names it in messages.

    Raises:
        SettingsError: it is no TOML, it is not valid with these settings, or there is no place for them.
    """
    from tomlkit.exceptions import TOMLKitError

    try:
        wanted = overridden(copy.deepcopy(tomllib.loads(text)), values=values)
        check_settings(wanted, f"{source}, with these settings,")
        new = _with_values(_uncommented(text, values), values)
        done = tomllib.loads(new) == wanted
    except (ValueError, TOMLKitError) as error:
        raise SettingsError(f"{source} cannot be changed: {error}", _by_flags(values)) from error
    if not done:
        raise SettingsError(f"{source} is written in a way that has no place for new settings", _by_flags(values))
    return new


def _uncommented(text: str, values: Mapping[str, Any]) -> str:
    """The text with the commented line of each key, as `ocd init` writes it, made a setting; the value is still the old one."""
    present = tomllib.loads(text)
    for name in values:
        table, _, key = name.partition(".")
        section = re.search(rf"^\[{re.escape(table)}\].*?(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL)
        if section is None or key in present.get(table, {}):
            continue
        line = re.search(rf"^# ?({re.escape(key)} = .*)$", section.group(), re.MULTILINE)
        with contextlib.suppress(tomllib.TOMLDecodeError):
            if line is not None and tomllib.loads(line[1].rstrip("\r")):
                start, end = section.start() + line.start(), section.start() + line.end()
                text = text[:start] + line[1] + text[end:]
    return text


def _with_values(text: str, values: Mapping[str, Any]) -> str:
    import tomlkit

    document = tomlkit.parse(text)
    for name, value in values.items():
        table, _, key = name.partition(".")
        if table not in document:
            if document.as_string().strip():
                document.add(tomlkit.nl())
            document.add(table, tomlkit.table())
        document[table][key] = value
    new = tomlkit.dumps(document)
    # Lines of Windows stay such.
    return re.sub(r"(?<!\r)\n", "\r\n", new) if "\r\n" in text and "\n" not in text.replace("\r\n", "") else new


def _by_flags(values: Mapping[str, Any]) -> str:
    return f"give them as flags instead: ocd run{as_flags(values)}"


@contextlib.contextmanager
def _refused(hint: str) -> Iterator[None]:
    """Turn what the system does not allow into an error of settings."""
    try:
        yield
    except ArtifactError as error:
        raise SettingsError(error.message, hint) from error
    except OSError as error:
        raise SettingsError(f"{error.filename} cannot be written: {error.strerror}", hint) from error
