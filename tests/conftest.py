"""Fixtures that all tests share: small projects, the command line called in this process, and processes beside the test."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

# Many small products are slower on several threads, and a fixed count gives fixed bits. Set before torch is imported, and
# inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from folders import Folder, make_folder, results
from hypothesis import settings
from processes import SmallDisk, Started, wait_until
from typer.testing import CliRunner, Result

from ocd_cli.app import app
from stages.tasks.fetch import cache_folder

# The same examples every time, however long one takes.
settings.register_profile("tests", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("tests")
# Taken before a fixture hides it.
OCD_DATA = os.environ.get("OCD_DATA")


class Commands:
    """Runs a command on a project: `ocd(folder, "collect", code=0)`; the exit code is asserted and no traceback is shown."""

    def __init__(self, device: str) -> None:
        self._device = device

    def __call__(self, folder: Folder | None, *args: object, code: int = 0) -> Result:
        words = [str(arg) for arg in args]
        if folder is not None and "--config" not in words:
            words += ["--config", str(folder.config)]
        if "--device" not in words and "--help" not in words:
            words += ["--device", self._device]
        result = CliRunner().invoke(app, words, prog_name="ocd")
        shown = f"ocd {' '.join(words)}\n{result.stdout}\n{result.stderr}"
        assert result.exit_code == code, shown
        assert "Traceback" not in shown
        return result

    def json(self, folder: Folder | None, *args: object, code: int = 0) -> dict[str, Any]:
        """The one object that it prints with `--json`."""
        found = json.loads(self(folder, *args, "--json", "--quiet", code=code).stdout)
        assert isinstance(found, dict)
        return found


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the commands under test compute")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch):
    for name in ("OCD_CONFIG", "OCD_DATA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def real_data(monkeypatch):
    """Lets the test see a file of real data, or skips it: `real_data("mnist/…")`."""

    def see(name: str) -> None:
        if OCD_DATA:
            monkeypatch.setenv("OCD_DATA", OCD_DATA)
        if not (OCD_DATA and (Path(OCD_DATA) / name).is_file()) and not (cache_folder() / name).is_file():
            pytest.skip(f"{name} is neither in OCD_DATA nor downloaded")

    return see


@pytest.fixture(scope="session")
def ocd(request):
    """Runs commands, see `Commands`."""
    return Commands(request.config.getoption("--device"))


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


@pytest.fixture
def project(tmp_path, ocd):
    """Makes a project without results, `project({"collect": {"steps": 1}}, code="plain", rows=40)`, or done through a stage,
    `until="collect"`."""

    def make(settings: dict[str, dict[str, Any]] | None = None, until: str = "", **options: Any) -> Folder:
        folder = make_folder(tmp_path / "project", settings or {}, **options)
        if until:
            ocd(folder, "run", "--quiet", "--until", until)
        return folder

    return make


@pytest.fixture(scope="session")
def make_run(tmp_path_factory, ocd):
    """Makes projects done through a stage for fixtures of a wider scope than a test, which are not to be changed."""

    def make(settings: dict[str, dict[str, Any]], code: str = "plain", until: str = "infer", **options: Any) -> Folder:
        folder = make_folder(tmp_path_factory.mktemp("run") / "project", settings, code, **options)
        if until:
            ocd(folder, "run", "--quiet", "--until", until)
        return folder

    return make


@pytest.fixture(scope="session")
def finished_run(make_run):
    """A project with every stage done; not to be changed: tests take a copy, see `finished`."""
    return make_run({})


@pytest.fixture
def finished(finished_run, tmp_path):
    """A copy of a project with every stage done, with the times of its files."""
    return finished_run.copy(tmp_path / "finished")


@pytest.fixture
def untrained(finished):
    """The same, both trainings yet to be done."""
    return finished.without("train-diffusion", "train-scale")


@pytest.fixture(scope="session")
def collected_run(make_run):
    """A project of the slow model through collect, unbroken, in nine blocks; not to be changed, see `collected`."""
    return make_run({"collect": {"block_samples": 4, "batch_size": 2}}, "slow", "collect")


@pytest.fixture
def collected(collected_run, tmp_path):
    """A copy of a project that is done through collect."""
    return collected_run.copy(tmp_path / "collected")


@pytest.fixture
def ready(collected):
    """The same, about to collect."""
    return collected.without("collect")


@pytest.fixture
def whole(collected_run, ocd):
    """Asserts that a store is the unbroken run's, byte for byte, with nothing beside it."""

    def check(folder: Folder) -> None:
        assert results(folder, "collect") == results(collected_run, "collect")
        names = {path.name for path in folder.run.iterdir()} - {".locks"}
        assert names == {"run.json", "train-base", "select-layer", "collect"}
        ocd(folder, "verify")

    return check
