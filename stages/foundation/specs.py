"""Names of the user's code in settings, "module:name", and the files they stand for."""

import re
from pathlib import Path

from stages.foundation.errors import SettingsError

_SPEC = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_code(spec: str) -> bool:
    """Whether a setting such as `train` names Python ("module:name") rather than a file."""
    return _SPEC.fullmatch(spec) is not None


def split_spec(spec: str, setting: str) -> tuple[str, str]:
    """Split "module:name".

    Raises:
        SettingsError: `spec` has another form.
    """
    if not is_code(spec):
        raise SettingsError(f'{setting} = {spec!r}: expected "module:name"', 'for example "mymodel:LeNet5"')
    module, _, name = spec.partition(":")
    return module, name


def module_file(root: Path, module: str) -> Path | None:
    """The user's file for a module: under the folder of `ocd.toml`, or None where it is an installed package."""
    base = root.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)
