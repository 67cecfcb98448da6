"""`run.threads` is what torch, BLAS and OpenMP have while a stage works, and what was before comes back."""

import json

import pytest
import sklearn.cluster  # noqa: F401 (it brings scipy's BLAS, and an OpenMP of its own)
import torch
from threadpoolctl import threadpool_info, threadpool_limits

# Written down by the user's own loss.
ASKING = """

import json
from pathlib import Path
import numpy, scipy.linalg, sklearn.cluster, torch
from threadpoolctl import threadpool_info

def asking(output, y):
    found = {"torch": torch.get_num_threads()} | {entry["filepath"]: entry["num_threads"] for entry in threadpool_info()}
    (Path(__file__).parent / "threads.json").write_text(json.dumps(found))
    return torch.nn.functional.cross_entropy(output, y, reduction="none")
"""


def counts():
    return {"torch": torch.get_num_threads()} | {entry["filepath"]: entry["num_threads"] for entry in threadpool_info()}


@pytest.fixture
def asking(project):
    # Tuned, train-diffusion runs the user's code, too.
    settings = {"run": {"threads": 1}, "train-diffusion": {"tune_after": 20, "tune_samples": 8}}
    task = {"loss": "mymodel:asking", "kind": "classification", "validation_fraction": 0.3}
    folder = project({"task": task, **settings})
    path = folder.root / "mymodel.py"
    path.write_text(path.read_text() + ASKING)
    return folder


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    with threadpool_limits(2):
        torch.set_num_threads(2)
        yield
    torch.set_num_threads(threads)


def test_all_libraries_have_the_stages_threads(asking, ocd, two_threads):
    before, path = counts(), asking.root / "threads.json"
    assert 2 in before.values()
    for stage in ("train-base", "select-layer", "collect", "train-scale", "train-diffusion", "infer", "probe"):
        path.unlink(missing_ok=True)
        ocd(asking, stage)
        if stage != "train-scale":
            found = json.loads(path.read_text())
            assert any("scipy.libs" in name for name in found)
            assert set(found.values()) == {1}, found
        assert counts() == before
