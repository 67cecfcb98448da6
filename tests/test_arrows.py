"""Which package may import which: the one-way street, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"}
# A package and those it may import. Commands may import every package, and none of them another command.
ALLOWED = {
    "foundation": "",
    "run_directory": "foundation",
    "store": "foundation run_directory",
    "per_sample": "foundation",
    "diffusion": "foundation",
    "tasks": "foundation per_sample",
    "overfitting": "foundation per_sample store tasks",
    "lifecycle": "foundation per_sample run_directory store tasks",
    "training": "diffusion foundation overfitting per_sample run_directory store tasks",
    "prediction": "diffusion foundation lifecycle overfitting per_sample run_directory store tasks training",
    "evaluation": "diffusion foundation lifecycle overfitting per_sample prediction run_directory store tasks training",
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def part_of(module):
    return module.split(".")[1] if module.startswith("stages.") else None


@pytest.mark.parametrize("path", sorted((ROOT / "stages").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_library_imports(path):
    mine = path.relative_to(ROOT / "stages").parts[0].removesuffix(".py")
    for module in imports(path):
        assert module.split(".")[0] not in {"typer", "rich", "click", "ocd_cli", "pickle"}, module
        other = part_of(module)
        if other is None or other == mine:
            continue
        assert other not in COMMANDS, f"{mine} imports the command {module}"
        assert mine in COMMANDS or other in ALLOWED[mine].split(), f"{mine} imports {module}"


@pytest.mark.parametrize("package", ALLOWED)
def test_every_arrow_is_in_use(package):
    found = {part_of(module) for path in (ROOT / "stages" / package).glob("*.py") for module in imports(path)}
    assert sorted(found - {None, package}) == ALLOWED[package].split()


@pytest.mark.parametrize("path", sorted((ROOT / "ocd_cli").glob("*.py")), ids=lambda path: path.name)
def test_command_line_imports(path):
    allowed = COMMANDS | {"foundation", "run_directory", "lifecycle"}
    assert all(part_of(module) in allowed for module in imports(path) if module.startswith("stages."))


@pytest.mark.parametrize("words", [["--help"], ["collect", "--help"], ["status", "--help"], ["status"], ["status", "--json"]])
def test_light_commands_import_neither_torch_nor_zarr(words, finished):
    code = f"""
import sys
from ocd_cli.app import app
sys.argv = ["ocd", *{words!r}]
try:
    app()
except SystemExit as end:
    assert end.code == 0, end.code
assert not {{"torch", "zarr", "numpy", "mymodel"}} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=finished.root, check=True, capture_output=True, text=True)
