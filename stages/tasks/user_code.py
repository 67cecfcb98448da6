"""Running the user's code so that what it raises becomes one message with the user's own frames."""

import contextlib
import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from stages.foundation.errors import ComputeError, OcdError, TaskError
from stages.foundation.seeds import seed_of
from stages.foundation.specs import module_file, split_spec

_OURS = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def user_code(what: str) -> Iterator[None]:
    """Run a piece of the user's code; `what` says which in the message.

    Raises:
        TaskError: it raised; the message ends with the frames of the user's own files.
        ComputeError: memory ran out.
    """
    try:
        yield
    except (OcdError, KeyboardInterrupt):
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ComputeError(f"{what}: out of memory: {error}", "use smaller batches: --set <stage>.batch_size=N") from error
    except (Exception, SystemExit) as error:
        raise TaskError(
            f"{what} raised {type(error).__name__}: {error}{_frames(error)}", "mend it, then run the same command again"
        ) from error


def _frames(error: BaseException) -> str:
    """The user's frames of a traceback, innermost last; libraries' and our own are left out."""
    lines = []
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        library = (
            "site-packages" in path.parts
            or frame.filename.startswith("<")
            or ("lib" in path.parts and "python3" in frame.filename)
        )
        if not library and not path.resolve().is_relative_to(_OURS):
            lines.append(f"\n  {path.name}, line {frame.lineno}, in {frame.name}: {frame.line or ''}".rstrip())
    return "".join(lines[-4:])


def load_object(root: Path, spec: str, setting: str) -> Any:
    """The object that "module:name" names: from a file under `root`, else from an installed package.

    Raises:
        SettingsError: `spec` has another form.
        TaskError: the module does not exist, does not import, or has no such name (the nearest is offered).
    """
    module_name, name = split_spec(spec, setting)
    path = module_file(root, module_name)
    module = _load_file(root, path, module_name) if path else _load_package(root, module_name, setting)
    if not hasattr(module, name):
        public = [other for other in vars(module) if not other.startswith("_")]
        near = difflib.get_close_matches(name, public, 1)
        raise TaskError(
            f"{setting} = {spec!r}: {path or module_name} has no {name}",
            f"did you mean {near[0]}?" if near else f"it has {', '.join(public[:8]) or 'no public names'}",
        )
    return getattr(module, name)


def _load_file(root: Path, path: Path, module_name: str) -> ModuleType:
    # Loaded by its file and under a name of its own, so that a user's `task.py` or `test.py` meets no other module.
    key = f"ocd_user_{seed_of(str(path.resolve()), path.stat().st_mtime_ns):016x}_{module_name.replace('.', '_')}"
    if key in sys.modules:
        return sys.modules[key]
    if str(root) not in sys.path:
        sys.path.append(str(root))
    spec = importlib.util.spec_from_file_location(key, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    try:
        with user_code(f"importing {path}"):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[key]
        raise
    return module


def _load_package(root: Path, module_name: str, setting: str) -> ModuleType:
    try:
        with user_code(f"importing {module_name}"):
            return importlib.import_module(module_name)
    except TaskError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name == module_name.split(".")[0]:
            raise TaskError(
                f"{setting}: no module {module_name} in {root}, and none is installed",
                f"write {module_name.replace('.', '/')}.py there, or mend the setting",
            ) from error
        raise
