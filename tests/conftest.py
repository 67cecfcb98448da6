"""Fixtures that all tests share: small projects in temporary folders, and the command line called in this process."""

import contextlib
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Many small products are slower on several threads, and a fixed count gives fixed bits. Set before torch is imported, and
# inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from ocd_cli.app import app, main
from stages.overfitting.collector import Collector
from stages.prediction.predicting import Answering
from stages.store.delta_store import DeltaStore
from stages.store.predictions import Answer
from stages.store.reader import StoreReader

MODEL = """\
from torch import nn


def net(width=6):
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))
"""

# The same network, which takes as long as the environment says.
SLOW_MODEL = """\
import os, time
from torch import nn


class Net(nn.Sequential):
    def forward(self, x):
        time.sleep(float(os.environ.get("SLOW_FORWARD_S", "0")))
        return super().forward(x)


def net(width=6):
    return Net(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))
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


@contextlib.contextmanager
def stopped_at(block: int, error: BaseException | None = None, kind: type[DeltaStore | Answer] = DeltaStore) -> Any:
    """From this block on, none can be written: an interruption, or another error."""
    write = kind.write_block

    def stopped(self, number, *args, **named):
        if number >= block:
            raise error or KeyboardInterrupt
        write(self, number, *args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "write_block", stopped)
        yield


@contextlib.contextmanager
def counted_blocks(kind: type[DeltaStore | Answer] = DeltaStore) -> Any:
    """The blocks written meanwhile, in no order: writers work side by side."""
    write, written = kind.write_block, []

    def counted(self, number, *args, **named):
        written.append(number)
        write(self, number, *args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "write_block", counted)
        yield written


def slow_down(delay: float) -> None:
    """Let each pass of `SLOW_MODEL` take this many seconds once the work of collect or infer has begun; for good."""

    def slowed(work: Any) -> Any:
        def slow(*args: Any) -> None:
            os.environ["SLOW_FORWARD_S"] = str(delay)
            work(*args)

        return slow

    Collector.work, Answering.work = slowed(Collector.work), slowed(Answering.work)


class Started:
    """`ocd` in a process of its own, forked from this one: what is imported already need not be imported again.

    Args:
        folder: the project.
        args: the command's words.
        delay: seconds that each pass of `SLOW_MODEL` takes once the work of collect or infer has begun.
    """

    def __init__(self, folder: Folder, *args: object, delay: float = 0.0) -> None:
        words = [*map(str, args), "--config", str(folder.config), "--device", "cpu"]
        self._texts = [folder.root / f"{time.monotonic_ns()}.{name}" for name in ("stdout", "stderr")]
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._become(words, delay)

    def _become(self, words: list[str], delay: float) -> None:
        code = 70
        try:
            for number, path in zip((1, 2), self._texts, strict=True):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
            # A shell's background jobs ignore it, and what they start inherits that.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            slow_down(delay)
            sys.argv = ["ocd", *words]
            try:
                main()
            except SystemExit as end:
                code = end.code or 0
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    @property
    def stdout(self) -> str:
        """What it has printed."""
        return self._texts[0].read_text()

    @property
    def stderr(self) -> str:
        """What it has told."""
        return self._texts[1].read_text()

    def ended(self) -> bool:
        """Whether it has."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code is not None

    def wait(self, code: int = 0, timeout: float = 60) -> "Started":
        """Wait for its end; the exit code is asserted (negative: the signal), and no traceback is shown."""
        wait_until(self.ended, timeout)
        shown = f"exit code {self._code}\n{self.stdout}\n{self.stderr}"
        assert self._code == code, shown
        assert "Traceback" not in shown
        return self

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, unless it has ended."""
        if not self.ended():
            os.kill(self.pid, number)


@dataclass(frozen=True)
class SmallDisk:
    """A file system with little room."""

    path: Path

    def resize(self, size: str) -> None:
        """Give it another size."""
        subprocess.run(["mount", "-o", f"remount,size={size}", self.path], check=True)

    def fill(self, free: int = 0) -> Path:
        """A file that takes all room but some; delete it to have the room back."""
        path, left = self.path / "filler", shutil.disk_usage(self.path).free - free
        with path.open("ab") as stream:
            os.posix_fallocate(stream.fileno(), stream.tell(), left)
        return path


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB; without the right to mount one, the test is skipped."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system ({mounted.stderr.strip()}): run as root, or under unshare -rm")
    yield SmallDisk(path)
    subprocess.run(["umount", "--lazy", path], check=True)


def wait_until(ready: Any, timeout: float = 60) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


@pytest.fixture
def start():
    """Starts commands beside the test, see `Started`; those still there at its end are killed."""
    processes = []

    def call(*args: Any, **named: Any) -> Started:
        processes.append(Started(*args, **named))
        return processes[-1]

    yield call
    for process in processes:
        process.kill()
        wait_until(process.ended)


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


@pytest.fixture(scope="session")
def collected_run(tmp_path_factory, ocd):
    """A project of the slow model through collect, unbroken, in nine blocks; not to be changed, see `collected`."""
    settings = {"collect": {"block_samples": 4, "batch_size": 2}}
    folder = make_folder(tmp_path_factory.mktemp("collected") / "project", settings, model=SLOW_MODEL)
    ocd(folder, "run", "--quiet", "--until", "collect")
    return folder


@pytest.fixture
def collected(collected_run, tmp_path):
    """A copy of a project that is done through collect."""
    shutil.copytree(collected_run.root, tmp_path / "collected")
    return Folder(tmp_path / "collected")


@pytest.fixture
def ready(collected):
    """The same, about to collect."""
    shutil.rmtree(collected.run / "collect")
    return collected


@pytest.fixture
def whole(collected_run, ocd):
    """Asserts that a store is the unbroken run's, byte for byte, with nothing beside it."""

    def check(folder: Folder) -> None:
        assert results(folder, "collect") == results(collected_run, "collect")
        names = {path.name for path in folder.run.iterdir()} - {".locks"}
        assert names == {"run.json", "train-base", "select-layer", "collect"}
        ocd(folder, "verify")

    return check
