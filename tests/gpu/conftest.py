"""Tests that run commands on pretended GPUs, and compare with the CPU's results. See `bash tests/run.sh --gpu`."""

from pathlib import Path

import numpy as np
import pytest
from folders import Folder, make_folder
from gpus import FAST, Gpus, find_pretence


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever asks for the GPUs is marked."""
    for item in items:
        if {"gpus", "pretended"} & {*item.fixturenames}:
            item.add_marker(pytest.mark.pretended_gpu)


@pytest.fixture(scope="session")
def gpus():
    """Runs commands where torch sees two GPUs, see `Gpus`; without pretend_cuda.py tests are skipped."""
    if not find_pretence().is_file():
        pytest.skip(f"{find_pretence()} is not there to pretend GPUs; name pretend_cuda.py with OCD_PRETEND_CUDA")
    found = Gpus()
    if found.complaint:
        pytest.skip(f"no GPU can be pretended: {found.complaint.splitlines()[-1]}")
    yield found
    found.close()


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory, ocd):
    """Makes projects done on the CPU, see `make_folder`, which are not to be changed; `shaped` changes their inputs."""

    def make(settings: dict, *commands: str, code: str = "plain", shaped: str = "") -> Folder:
        tables = {name: {**FAST.get(name, {}), **settings.get(name, {})} for name in FAST | settings}
        folder = make_folder(tmp_path_factory.mktemp("cpu") / "project", tables, code, rows=60)
        if shaped:
            change_inputs(folder, shaped)
        for command in commands:
            ocd(folder, *command.split(), "--quiet", "--device", "cpu")
        return folder

    return make


def change_inputs(folder: Folder, shaped: str) -> None:
    """Vectors of four numbers as sequences (N, 1, 4), or as three words (N, 3) of nine."""
    for name in ("train.npz", "test.npz"):
        found = dict(np.load(Path(folder.root) / name))
        x = found["x"][:, None] if shaped == "sequences" else np.abs(found["x"][:, :3] * 4).astype(np.int64) % 9
        folder.save(name, x, found["y"])


@pytest.fixture(scope="session")
def trained_on_cpu(on_cpu):
    """A small perceptron with every stage done."""
    return on_cpu({}, "run", "evaluate")
