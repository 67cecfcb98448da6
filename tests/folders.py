"""Projects in temporary folders, of the code in tests/projects, and what a test looks at in their run directories."""

import copy
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.store.reader import StoreReader

PROJECTS, EXAMPLES = Path(__file__).parent / "projects", Path(__file__).parent.parent / "examples"
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
    # A training more, which few tests look at.
    "evaluate": {"longer_base": False},
}


@dataclass(frozen=True)
class Folder:
    """A project's folder: `ocd.toml`, the user's code, `train.npz`, `test.npz`, and later `run`."""

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

    def copy(self, place: Path) -> "Folder":
        """The same elsewhere, with the times of its files."""
        return Folder(Path(shutil.copytree(self.root, place)))

    def without(self, *stages: str) -> "Folder":
        """Itself, with these stages about to be done."""
        for stage in stages:
            shutil.rmtree(self.run / stage)
        return self

    def manifest(self, stage: str) -> dict[str, Any]:
        """The manifest of a finished stage, or of an answer such as `infer/test`."""
        return self.read(f"{stage}/manifest.json")

    def summary(self, stage: str) -> dict[str, Any]:
        """What a finished stage says of itself."""
        return self.manifest(stage)["summary"]

    def read(self, name: str) -> Any:
        """What a JSON file of the run directory holds; of one that ends in `.jsonl` a list, a line each."""
        text = (self.run / name).read_text()
        return [json.loads(line) for line in text.splitlines()] if name.endswith(".jsonl") else json.loads(text)

    def predictions(self, name: str = "test") -> dict[str, np.ndarray]:
        """The arrays of an answer."""
        with np.load(self.run / "infer" / name / "predictions.npz", allow_pickle=False) as archive:
            return dict(archive)

    def edit(self, name: str, old: str, new: str) -> None:
        """Put one text in the place of another in a file of the user's."""
        text = (self.root / name).read_text()
        assert old in text
        (self.root / name).write_text(text.replace(old, new))

    def files(self) -> dict[str, bytes]:
        """What every file of the run directory holds; locks come and go."""
        return {
            path.relative_to(self.run).as_posix(): path.read_bytes()
            for path in sorted(self.run.rglob("*"))
            if path.is_file() and ".locks" not in path.parts
        }


def results(folder: Folder, stage: str) -> dict[str, bytes]:
    """The bytes of a finished stage's files but those that tell of time."""
    mine = {name: data for name, data in folder.files().items() if name.startswith(f"{stage}/")}
    return {name: data for name, data in mine.items() if not name.endswith(("manifest.json", "log.txt"))}


def store(folder: Folder) -> dict[str, np.ndarray]:
    """Every array of the finished delta store, by name."""
    reader = reader_of(folder)
    return {name: reader.read(name) for name in reader.description.arrays}


def reader_of(folder: Folder) -> StoreReader:
    """Reads the finished delta store."""
    return StoreReader.of(folder.run / "collect")


def blocks_of(folder: Folder, stage: str = "collect.wip") -> list[Path]:
    """The records of the blocks that are done."""
    return sorted((folder.run / stage / "blocks").glob("*.json"))


def flip(path: Path, *, keep_time: bool = False) -> None:
    """Another byte in the middle; the size stays, and the time if wanted."""
    info, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if keep_time:
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


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


def own_task(name: str, **args: Any) -> dict[str, Any]:
    """The `[task]` of a class of the user's own, in place of the table in `SETTINGS`."""
    return {"class": name, **({"args": args} if args else {}), **dict.fromkeys(("model", "loss", "train", "test"))}


def put(*settings: str) -> list[str]:
    """The words that put settings in: `put("collect.lr=0.02", …)`."""
    return [word for setting in settings for word in ("--set", setting)]


def put_all(table: str, settings: dict[str, Any]) -> list[str]:
    """The words that put settings of one table in."""
    return put(*(f"{table}.{key}={value}" for key, value in settings.items()))


def status(ocd: Any, folder: Folder, *words: object) -> dict[str, dict[str, Any]]:
    """The stages of `ocd status --json`."""
    return ocd.json(folder, "status", *words)["stages"]


def states(ocd: Any, folder: Folder, *settings: str) -> dict[str, str]:
    """The state of each stage, with these settings put in."""
    return {name: entry["state"] for name, entry in status(ocd, folder, *put(*settings)).items()}


def make_folder(root: Path, settings: dict[str, dict[str, Any]], code: str = "plain", rows: int = 40) -> Folder:
    """A project's folder with everything but results: `code` is the folder of tests/projects to copy."""
    shutil.copytree(PROJECTS / code, root, ignore=shutil.ignore_patterns("__pycache__"))
    folder = Folder(root)
    folder.write(settings)
    folder.save("train.npz", *arrays(rows, 0))
    folder.save("test.npz", *arrays(24, 1))
    return folder


def example(name: str, place: Path) -> Folder:
    """A copy of an example, so that nothing is left in the source tree."""
    unwanted = shutil.ignore_patterns("run", "run-*", "__pycache__")
    return Folder(Path(shutil.copytree(EXAMPLES / name, place / name, ignore=unwanted)))
