"""The user's modules, imported as Python would import them for a script in the folder of `ocd.toml`."""

import contextlib
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from stages.foundation.errors import TaskError
from stages.foundation.seeds import seed_of
from stages.foundation.specs import module_file, split_spec
from stages.foundation.torch_state import USUAL, Defaults, left_by_import, set_theirs
from stages.tasks.user_code import user_code

OURS = ("stages", "ocd_cli")
# Imported before any of the user's files, of which one may have the name of one of them.
LIBRARIES = ("numpy", "numcodecs", "pydantic", "safetensors", "torch", "zarr")
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class _Loaded:
    """A module of the user's.

    Attributes:
        module: as imported.
        root: of its project.
        mtime_ns: of its file.
        defaults: of torch, as the import left them.
    """

    module: ModuleType
    root: Path
    mtime_ns: int
    defaults: Defaults


# By file; the names, in sys.modules, of all that was imported from the folder of the present project; and that folder, where it
# stands on the import path because of us.
_loaded: dict[Path, _Loaded] = {}
_brought: set[str] = set()
_places: list[str] = []


def load_object(root: Path, spec: str, setting: str) -> Any:
    """The object that "module:name" names: from a file under `root`, else from an installed package.

    Raises:
        SettingsError: `spec` has another form.
        TaskError: the module does not exist, does not import, or has no such name (the nearest is offered); a file of the
            user's has the name of one of our packages.
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
    _refuse_our_names(root)
    mtime = path.stat().st_mtime_ns
    found = _loaded.get(path)
    if found is None or found.mtime_ns != mtime:
        if found is not None or any(other.root != root for other in _loaded.values()):
            # One project at a time has its modules under their names.
            _forget()
        for library in LIBRARIES:
            importlib.import_module(library)
        with _importing(root, path), user_code(f"importing {path}"):
            module = _import(path, module_name)
            found = _Loaded(module, root, mtime, left_by_import())
        _loaded[path] = found
    if found.defaults != USUAL:
        set_theirs(found.defaults)
    return found.module


def _import(path: Path, module_name: str) -> ModuleType:
    known = sys.modules.get(module_name)
    if known is not None and Path(getattr(known, "__file__", None) or ".").resolve() == path.resolve():
        # Whoever calls the library has imported it.
        return known
    top = sys.modules.get(module_name.partition(".")[0])
    ours = top is not None and any(Path(place).resolve() in path.resolve().parents for place in getattr(top, "__path__", []))
    if top is None or ours or module_name.partition(".")[0] in _brought:
        return importlib.import_module(module_name)
    # A library has its name already.
    key = f"ocd_user_{seed_of(str(path)):016x}"
    spec = importlib.util.spec_from_file_location(key, path)
    sys.modules[key] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[key])
    return sys.modules[key]


@contextlib.contextmanager
def _importing(root: Path, path: Path) -> Iterator[None]:
    """The project's folder first on the import path, for as long as its files are imported, and last from then on, so that a
    file named like a library is taken for that by nobody else; and no words of our command line."""
    place, argv, before = str(root), sys.argv, set(sys.modules)
    importlib.invalidate_caches()
    sys.path.insert(0, place)
    sys.argv = [str(path)]
    try:
        yield
    except BaseException:
        for name in _from_folder(root, before):
            del sys.modules[name]
        raise
    finally:
        sys.argv = argv
        with contextlib.suppress(ValueError):
            sys.path.remove(place)
        if place not in sys.path:
            sys.path.append(place)
            _places.append(place)
        _brought.update(_from_folder(root, before))


def _from_folder(root: Path, before: set[str]) -> list[str]:
    """The modules, not there before, that lie in a folder; an environment may lie in it, too."""
    files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items()) if name not in before}
    return [
        name
        for name, file in files.items()
        if file and Path(file).is_relative_to(root) and "site-packages" not in Path(file).parts
    ]


def _forget() -> None:
    """Of another project's modules, or of a file that has changed since."""
    for name in _brought:
        sys.modules.pop(name, None)
    for place in _places:
        if place in sys.path:
            sys.path.remove(place)
    for known in (_brought, _places, _loaded):
        known.clear()
    set_theirs(USUAL)


def _refuse_our_names(root: Path) -> None:
    for name in OURS:
        file = module_file(root, name)
        if file and not file.resolve().is_relative_to(_ROOT):
            raise TaskError(
                f"{file} has the name of a package of ocd's own, {name}: importing {name} finds ours, not yours",
                f"rename it, for example to my_{name}.py",
            )


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
