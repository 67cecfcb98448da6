"""Fixtures that all tests share: small projects in temporary folders, and the command line called in this process."""

import copy
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Many small products are slower on several threads, and a fixed count gives fixed bits. Set before torch is imported, and
# inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from ocd_cli.app import app

MODEL = """\
from torch import nn


def net(width=6):
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))
"""

# Every stage takes a fraction of a second; `patience = 0` makes the number of steps a matter of the settings alone.
SETTINGS: dict[str, dict[str, Any]] = {
    "run": {"seed": 1},
    "task": {"model": "mymodel:net", "loss": "cross_entropy", "train": "train.npz", "test": "test.npz"},
    "train-base": {"epochs": 2, "batch_size": 16, "lr": 0.01, "patience": 0},
    "select-layer": {"draws": 50, "samples": 8},
    "collect": {"steps": 2, "lr": 0.01},
    "train-diffusion": {"max_steps": 40, "evaluate_steps": 20, "width": 16, "blocks": 1, "batch_size": 16, "patience": 0},
    "train-scale": {"max_steps": 40, "evaluate_steps": 20, "width": 8, "batch_size": 16, "patience": 0},
    "infer": {"ensemble": 2, "sample_steps": 3},
}


@dataclass(frozen=True)
class Folder:
    """A project's folder: `ocd.toml`, `mymodel.py`, `train.npz`, `test.npz`, and later `run`."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "ocd.toml"

    @property
    def run(self) -> Path:
        return self.root / "run"

    def write(self, settings: dict[str, dict[str, Any]]) -> None:
        """Write `ocd.toml`: the fast settings with these put in; None leaves one out."""
        tables = copy.deepcopy(SETTINGS)
        for table, values in settings.items():
            tables.setdefault(table, {}).update(values)
        lines = []
        for table, values in tables.items():
            lines.append(f"[{table}]")
            lines += [f"{key} = {toml(value)}" for key, value in values.items() if value is not None]
        self.config.write_text("\n".join(lines) + "\n")

    def save(self, name: str, x: Any, y: Any = None) -> Path:
        """Write an npz file."""
        path = self.root / name
        np.savez(path, x=x, **({} if y is None else {"y": y}))
        return path

    def files(self) -> dict[str, bytes]:
        """What every file of the run directory holds; locks come and go."""
        return {
            path.relative_to(self.run).as_posix(): path.read_bytes()
            for path in sorted(self.run.rglob("*"))
            if path.is_file() and ".locks" not in path.parts
        }


def toml(value: Any) -> str:
    """A value as TOML; but for tables, JSON's spelling is TOML's."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(entry)}" for key, entry in value.items()) + "}"
    return json.dumps(value)


def arrays(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (rows, 4) and labels of three classes that a small network can tell apart, not perfectly."""
    draw = np.random.default_rng(seed)
    y = np.arange(rows) % 3
    x = draw.normal(size=(rows, 4)) + np.eye(4)[y]
    return x.astype(np.float32), y


def states(ocd: Any, folder: Folder, *settings: str) -> dict[str, str]:
    """The state of each stage, as `ocd status --json` has it with these settings put in."""
    words = [word for setting in settings for word in ("--set", setting)]
    stages = json.loads(ocd(folder, "status", "--json", *words).stdout)["stages"]
    return {name: entry["state"] for name, entry in stages.items()}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the commands under test compute")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch):
    for name in ("OCD_CONFIG", "OCD_DATA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def ocd(request):
    """Runs a command on a project: `ocd(folder, "collect", code=0)`; the exit code is asserted and no traceback is shown."""
    device = request.config.getoption("--device")

    def call(folder: Folder | None, *args: object, code: int = 0) -> Result:
        words = [str(arg) for arg in args]
        if folder is not None and "--config" not in words:
            words += ["--config", str(folder.config)]
        if "--device" not in words and "--help" not in words:
            words += ["--device", device]
        result = CliRunner().invoke(app, words, prog_name="ocd")
        shown = f"ocd {' '.join(words)}\n{result.stdout}\n{result.stderr}"
        assert result.exit_code == code, shown
        assert "Traceback" not in shown
        return result

    return call


def make_folder(root: Path, settings: dict[str, dict[str, Any]], model: str = MODEL, rows: int = 40) -> Folder:
    """A project's folder with everything but results."""
    root.mkdir(parents=True, exist_ok=True)
    folder = Folder(root)
    folder.write(settings)
    (root / "mymodel.py").write_text(model)
    folder.save("train.npz", *arrays(rows, 0))
    folder.save("test.npz", *arrays(24, 1))
    return folder


@pytest.fixture
def project(tmp_path):
    """Makes a project without results: `project({"collect": {"steps": 1}}, model="…", rows=40)`."""

    def make(settings: dict[str, dict[str, Any]] | None = None, **options: Any) -> Folder:
        return make_folder(tmp_path / "project", settings or {}, **options)

    return make


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, ocd):
    """A project with every stage done; not to be changed: tests take a copy, see `finished`."""
    folder = make_folder(tmp_path_factory.mktemp("finished") / "project", {})
    ocd(folder, "run", "--quiet")
    return folder


@pytest.fixture
def finished(finished_run, tmp_path):
    """A copy of a project with every stage done, with the times of its files."""
    shutil.copytree(finished_run.root, tmp_path / "finished")
    return Folder(tmp_path / "finished")
