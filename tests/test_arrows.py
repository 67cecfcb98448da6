"""Which module may import which: the one-way street of the design, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = {"foundation"}
COMMANDS = {
    "init",
    "train_base",
    "select_layer",
    "collect",
    "train_diffusion",
    "train_scale",
    "infer",
    "evaluate",
    "probe",
    "run",
    "status",
    "verify",
}
# What each part of the library may import of the others, beside the leaves.
ALLOWED = {
    "artifacts": set(),
    "weights": set(),
    "diffusion": set(),
    "tasks": {"weights"},
    "evaluation": {"tasks", "weights"},
    "materials": {"artifacts", "tasks", "weights"},
    "collector": {"artifacts", "tasks", "weights"},
    "answering": {"artifacts", "tasks", "weights"},
    "outcome": set(),
    "branches": {"artifacts", "materials", "outcome"},
    "training_deltas": {"artifacts"},
    "training_rows": {"artifacts", "diffusion"},
    "encoding": {"artifacts", "diffusion", "tasks"},
    "denoiser_training": {"artifacts", "diffusion", "encoding", "training_rows"},
    "tuning": {"diffusion", "tasks", "weights"},
    "hooks": {"artifacts", "materials", "outcome"},
    "stage": {"artifacts", "hooks", "materials", "outcome"},
    "sharing": {"artifacts", "outcome", "stage"},
    "predictor": {"artifacts", "tasks", "weights", "diffusion", "encoding", "materials"},
    "cost": {"artifacts", "materials", "predictor"},
    "examination": {
        "artifacts",
        "collector",
        "diffusion",
        "evaluation",
        "materials",
        "predictor",
        "tasks",
        "training_deltas",
        "weights",
    },
    "pictures": {"answering", "artifacts", "evaluation", "examination", "materials", "tasks"},
    "costly": {"artifacts", "branches", "evaluation", "examination", "materials", "tasks", "weights"},
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
    relative = path.relative_to(ROOT / "stages")
    mine = relative.parts[0].removesuffix(".py")
    for module in imports(path):
        assert module.split(".")[0] not in {"typer", "rich", "click", "ocd_cli", "pickle"}, module
        other = part_of(module)
        if other is None or other == mine or other in LEAVES:
            continue
        assert mine not in LEAVES, f"{mine} is a leaf but imports {module}"
        if mine in COMMANDS:
            assert other not in COMMANDS, f"{mine} imports the command {module}"
        else:
            assert other in ALLOWED[mine], f"{mine} imports {module}"


@pytest.mark.parametrize("path", sorted((ROOT / "ocd_cli").glob("*.py")), ids=lambda path: path.name)
def test_command_line_imports(path):
    allowed = COMMANDS | LEAVES | {"artifacts", "outcome"}
    assert all(part_of(module) in allowed for module in imports(path) if module.startswith("stages."))


@pytest.mark.parametrize("words", [["--help"], ["status", "--help"], ["status"]])
def test_light_commands_import_neither_torch_nor_zarr(words, finished):
    code = f"""
import sys
from ocd_cli.app import app
sys.argv = ["ocd", *{words!r}]
try:
    app()
except SystemExit as end:
    assert end.code == 0, end.code
assert not {{"torch", "zarr", "numpy"}} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=finished.root, check=True, capture_output=True, text=True)
