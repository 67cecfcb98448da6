"""A project: the settings of one `ocd.toml` with the overrides of a command, and the folders they name."""

import difflib
import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stages.foundation.config import Settings, tables
from stages.foundation.errors import SettingsError

CONFIG_NAME = "ocd.toml"


@dataclass(frozen=True)
class Project:
    """Checked settings, the file they came from, the run directory they lead to, and the texts that `--set` gave."""

    settings: Settings
    config_path: Path
    run_path: Path
    overrides: tuple[str, ...] = ()

    @property
    def flags(self) -> str:
        """What another command has to repeat to mean this run and this task, each flag after a space."""
        named = self.root / Path(self.settings.run.directory).expanduser()
        parts = [f"--run {shlex.quote(str(self.run_path))}"] if self.run_path != named else []
        parts += [f"--set {shlex.quote(text)}" for text in self.overrides if text.startswith(("task.", "run."))]
        return "".join(f" {part}" for part in parts)

    @property
    def all_flags(self) -> str:
        """The same, with all that `--set` gave."""
        return self.flags + set_flags(text for text in self.overrides if not text.startswith(("task.", "run.")))

    @property
    def root(self) -> Path:
        """The folder of `ocd.toml`: relative paths and the user's modules start here."""
        return self.config_path.parent

    @property
    def seed(self) -> int:
        return self.settings.run.seed


def find_config(start: Path) -> Path:
    """Find `ocd.toml` in `start` or above it, stopping at the home directory, another file system or another owner.

    Raises:
        SettingsError: there is none.
    """
    start = start.resolve()
    device, owner = start.stat().st_dev, start.stat().st_uid
    for folder in (start, *start.parents):
        info = folder.stat()
        if info.st_dev != device or info.st_uid != owner:
            break
        found = folder / CONFIG_NAME
        if found.is_file():
            if found.stat().st_uid != owner:
                break
            return found
        if folder == Path.home():
            break
    raise SettingsError(
        f"no {CONFIG_NAME} in {start} or above it",
        "write one with: ocd init    (or name one with --config FILE, or OCD_CONFIG)",
    )


def load_project(
    config: Path | str | None = None,
    *,
    run: Path | str | None = None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> Project:
    """Read and check a project's settings.

    Args:
        config: `ocd.toml`, or a folder that has one; else `OCD_CONFIG`, else found from the working directory upward.
        run: the run directory, in place of `[run] directory`.
        overrides: "table.key=value" texts, as `--set` takes them; values are TOML, bare words are strings.
        values: "table.key" to value, as flags give them; they win over `overrides`.

    Raises:
        SettingsError: no file, broken TOML, unknown keys (the nearest known one is offered), wrong types or ranges; all
            problems are listed at once.
    """
    path = _config_path(config)
    raw = overridden(_read_toml(path), overrides, values)
    settings = check_settings(raw, f"{path}, with the flags of this command," if overrides or values else str(path))
    directory = Path(run).absolute() if run is not None else path.parent / Path(settings.run.directory).expanduser()
    return Project(settings, path, directory, tuple(overrides))


def overridden(raw: dict[str, Any], overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Raw tables with "table.key=value" texts, then "table.key" values, put in.

    Raises:
        SettingsError: a text of another form, or a key inside something that is no table.
    """
    entries = [(*parse_override(text), f"--set {text}") for text in overrides] + [(k, v, k) for k, v in (values or {}).items()]
    for key, value, source in entries:
        _put(raw, key, value, source)
    return raw


def _config_path(config: Path | str | None) -> Path:
    config = config or os.environ.get("OCD_CONFIG")
    if not config:
        return find_config(Path.cwd())
    path = Path(config).expanduser().absolute()
    path = path / CONFIG_NAME if path.is_dir() else path
    if not path.is_file():
        raise SettingsError(f"no settings file at {path}", "write one with: ocd init")
    return path


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{path} is not valid TOML: {error}", "mend that line; ocd init writes a file to compare with"
        ) from error


def parse_override(text: str) -> tuple[str, Any]:
    """Split "table.key=value"; the value is read as TOML, and as a string where it is none.

    Raises:
        SettingsError: there is no `=` or no `.` before it.
    """
    key, sign, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not sign or "." not in key.strip("."):
        raise SettingsError(f"--set {text}: expected table.key=value", "for example: --set collect.lr=0.001")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def override_of(key: str, value: Any) -> str | None:
    """The text "table.key=value" that `parse_override` reads as this value; None where there is none, as for a setting that is
    not set."""
    texts = [] if value is None else [value, toml_value(value)] if isinstance(value, str) else [toml_value(value)]
    return next((text for text in (f"{key}={text}" for text in texts) if parse_override(text) == (key, value)), None)


def toml_value(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(key)} = {toml_value(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    # JSON escapes characters beyond 16 bits in two halves, which TOML refuses.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def as_flags(values: Mapping[str, Any]) -> str:
    """Settings, "table.key" to value, as flags of a command, each after a space and quoted for the shell."""
    return set_flags(text for key, value in values.items() if (text := override_of(key, value)))


def set_flags(texts: Iterable[str]) -> str:
    """Each text "table.key=value" as a flag, after a space."""
    return "".join(f" --set {shlex.quote(text)}" for text in texts)


def _put(raw: dict[str, Any], key: str, value: Any, source: str) -> None:
    table, _, name = key.partition(".")
    entries = raw.setdefault(table, {})
    if not isinstance(entries, dict):
        raise SettingsError(f"{source}: {table} is not a table", "tables are written [name] in ocd.toml")
    *parents, last = name.split(".")
    for parent in parents:
        entries = entries.setdefault(parent, {})
        if not isinstance(entries, dict):
            raise SettingsError(f"{source}: {table}.{parent} is not a table", "for example: --set task.model_args.width=8")
    entries[last] = value


def check_settings(raw: Mapping[str, Any], source: str) -> Settings:
    """Validate raw tables.

    Raises:
        SettingsError: with one line for every problem.
    """
    problems = []
    try:
        settings = Settings.model_validate(raw)
    except ValidationError as error:
        problems = [_problem(entries) for entries in _by_setting(error.errors())]
    else:
        problems = _task_problems(settings)
        if not problems:
            return settings
    noun = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise SettingsError(
        f"{source} has {noun}:\n" + "\n".join(f"  {line}" for line in problems),
        "ocd init writes a file with every setting explained",
    )


def _place(entry: Mapping[str, Any]) -> list[str]:
    """The setting an error is about, without the names of the types that were tried."""
    location = [str(part) for part in entry["loc"]]
    if entry["type"] == "extra_forbidden" or len(location) < 2 or location[0] not in tables():
        return location
    return location[:3] if location[1] in ("args", "model_args") else location[:2]


def _by_setting(errors: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Errors about one setting together: a setting of two possible types fails once for each."""
    found: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for entry in errors:
        found.setdefault(tuple(_place(entry)), []).append(entry)
    return list(found.values())


def _problem(entries: Sequence[Mapping[str, Any]]) -> str:
    """One line for one setting's errors: the setting, the value, what was expected, the nearest known name."""
    entry, location, known = entries[0], _place(entries[0]), tables()
    if entry["type"] == "extra_forbidden":
        names = list(known) if len(location) == 1 else [i.alias or n for n, i in known[location[0]].model_fields.items()]
        near = difflib.get_close_matches(location[-1], names, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(names)}"
        what = f"unknown table [{location[0]}]" if len(location) == 1 else f"unknown key {'.'.join(location)}"
        return f"{what}; {hint}"
    if entry["type"] == "missing":
        return f"table [{location[0]}] is missing; it names the model, its loss and its data"
    if entry["type"] == "model_type":
        return f"{location[0]} = {entry['input']!r}: expected a table, [{location[0]}]"
    expected = ", or ".join(dict.fromkeys(one["msg"][0].lower() + one["msg"][1:] for one in entries))
    return f"{'.'.join(location)} = {entry['input']!r}: {expected}"


def _task_problems(settings: Settings) -> list[str]:
    task = settings.task
    if task.class_:
        clash = [name for name in ("model", "loss", "train", "test", "validation") if getattr(task, name) is not None]
        return [f"task.{name} is set beside task.class; the Task class gives it" for name in clash]
    needed = {"model": '"mymodel:LeNet5"', "loss": '"cross_entropy"', "train": '"train.npz"', "test": '"test.npz"'}
    return [
        f"task.{name} is missing; for example {name} = {example}"
        for name, example in needed.items()
        if getattr(task, name) is None
    ]
