"""The options every command shares, and the wrapper that turns errors into messages and exit codes."""

import functools
import inspect
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from stages.foundation.errors import OcdError, SettingsError, TryAgainError
from stages.foundation.setting import Device
from stages.run_directory.project import Project, load_project


@dataclass(frozen=True)
class Shared:
    """The shared options of one call."""

    config: Annotated[
        Path | None, typer.Option(help="Settings file (default: ocd.toml here or above; or OCD_CONFIG).", metavar="FILE")
    ] = None
    run: Annotated[
        Path | None, typer.Option(help="Run directory (default: run beside the settings file).", metavar="FOLDER")
    ] = None
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting; repeatable.", metavar="TABLE.KEY=VALUE")
    ] = None
    device: Annotated[Device | None, typer.Option(help="Where to compute.")] = None
    seed: Annotated[int | None, typer.Option(help="Seed of every random draw.", min=0)] = None
    force: Annotated[
        bool, typer.Option("--force", help="Redo from scratch; the old result stays until the new one is whole.")
    ] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, how much and how many bytes.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes.")] = False

    def values(self, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The settings that flags give, by dotted name: `given`, and those that commands share; None is a flag not given."""
        found = {"run.device": self.device, "run.seed": self.seed, **(given or {})}
        return {key: value for key, value in found.items() if value is not None}

    def project(self, given: Mapping[str, Any] | None = None) -> Project:
        """The project of this call; the settings file used is named on stderr."""
        project = load_project(self.config, run=self.run, overrides=self.overrides or (), values=self.values(given))
        if not self.quiet:
            print(f"settings: {project.config_path}", file=sys.stderr)
        return project


def command(app: typer.Typer, name: str, example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function `f(shared, own options…)` as a command with the shared options added and errors handled."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function).parameters.values())[1:]
        shared = inspect.signature(Shared).parameters

        @functools.wraps(function)
        def wrapper(**arguments: Any) -> None:
            given = {key: arguments.pop(key) for key in shared}
            try:
                _check_working_directory()
                function(Shared(**given), **arguments)
            except BaseException as error:
                _fail(error)

        options = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in (*own, *shared.values())]
        wrapper.__signature__ = inspect.Signature(options)
        wrapper.__annotations__ = {option.name: option.annotation for option in options}
        app.command(name, epilog=f"Example: {example}")(wrapper)
        return function

    return register


def _fail(error: BaseException) -> NoReturn:
    """One message on stderr and the error's exit code; the traceback of a fault of ours goes into a file."""
    if isinstance(error, (typer.Exit, typer.BadParameter)):
        raise error
    if isinstance(error, KeyboardInterrupt):
        error = TryAgainError("interrupted", "to continue, run the same command again")
    if not isinstance(error, OcdError):
        out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        advice = f"out of memory: {error}", "use smaller batches, or free memory"
        error = OcdError(*advice if out_of_memory else _keep_traceback(error))
    raise typer.Exit(tell(error))


def tell(error: OcdError) -> int:
    """Say on stderr what is wrong and what to type next; the exit code."""
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"  {error.hint}", file=sys.stderr)
    return error.exit_code


def _check_working_directory() -> None:
    """Refuse one that was deleted: no path can be told from there, and some libraries do not load.

    Raises:
        SettingsError: with what the system says.
    """
    try:
        Path.cwd()
    except OSError as error:
        raise SettingsError(
            f"the working directory is gone ({error.strerror})", "go to a folder that exists: cd FOLDER"
        ) from error


def _keep_traceback(error: BaseException) -> tuple[str, str]:
    descriptor, name = tempfile.mkstemp(prefix=f"ocd-{time.strftime('%Y%m%d-%H%M%S')}-", suffix=".txt")
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        traceback.print_exception(error, file=stream)
    return f"a fault in ocd itself: {type(error).__name__}: {error}", f"please report it with {name}"


def print_json(value: Any) -> None:
    """The one object of `--json`, on stdout."""
    print(json.dumps(value, indent=1))
