"""init: write a commented `ocd.toml` that works as it stands."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from stages.foundation.config import TaskTable, tables
from stages.foundation.errors import SettingsError
from stages.foundation.files import write_bytes
from stages.foundation.setting import Table
from stages.run_directory.project import CONFIG_NAME, check_settings, overridden, toml_value

HEADER = """\
# Settings of one ocd project. Commented lines show the defaults; relative paths start at this file.
# Next: ocd run    (or stage by stage: ocd train-base, ocd select-layer, ocd collect, ...)
"""

TOY = "stages.tasks.toy:Spirals"
TOY_TASK = f"""\
# A toy problem that ships with ocd, so that this file works as it stands.
# For your own, delete the next line and fill in model, loss, train and test.
class = "{TOY}"
"""

EXAMPLES = {
    "model": '"mymodel:LeNet5"',
    "class": '"task:MyTask"',
    "weights": '"lenet5.safetensors"',
    "weights_key": '"state_dict"',
    "loss": '"cross_entropy"',
    "kind": '"classification"',
    "train": '"train.npz"',
    "test": '"test.npz"',
    "validation": '"validation.npz"',
    "validation_seed": "0",
    "encoder_weights": '"vgg11.safetensors"',
}


def init(
    path: Path,
    *,
    overrides: tuple[str, ...] = (),
    values: Mapping[str, Any] | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write `ocd.toml` with every setting, its meaning and its default.

    Args:
        path: the file, or a folder for it.
        overrides: "table.key=value" texts to write as set.
        values: "table.key" to value, the same.
        force: replace a file that is there.
        dry_run: only say what would be written.

    Returns:
        {"path", "text", "written"}.

    Raises:
        SettingsError: the file exists, or a value does not pass the checks every command makes.
    """
    path = path / CONFIG_NAME if path.is_dir() else path
    if path.exists() and not force:
        raise SettingsError(f"{path} exists", "edit it, or replace it with: ocd init --force")
    if not path.parent.is_dir():
        raise SettingsError(f"{path.parent} is not a folder", "make it first")
    chosen = overridden({}, overrides, values)
    check_settings(chosen if "task" in chosen else {**chosen, "task": {"class": TOY}}, str(path))
    text = render(chosen)
    if not dry_run:
        write_bytes(path, text.encode())
    return {"path": str(path), "text": text, "written": not dry_run}


def render(chosen: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of `ocd.toml` with the `chosen` settings (table to key to value) written out and all others commented."""
    parts = [HEADER]
    for name, table in tables().items():
        parts.append(f"\n[{name}]  # {table.title}\n")
        if table is TaskTable and name not in chosen:
            parts.append(TOY_TASK)
        parts += [_line(info.alias or key, info, chosen.get(name, {}), table) for key, info in table.model_fields.items()]
    return "".join(parts)


def _line(key: str, info: FieldInfo, chosen: Mapping[str, Any], table: type[Table]) -> str:
    """One setting: commented at its default, or set."""
    if key in chosen:
        return f"{key} = {toml_value(chosen[key])}  # {info.description}\n"
    shown = EXAMPLES.get(key) if info.default is None else toml_value(info.default)
    return f"# {key} = {shown}  # {info.description}\n"
