"""collect on a pretended GPU: it writes what a CPU writes, whatever the GPU does late, and seldom waits for it."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from folders import arrays, blocks_of, store

ROOT = Path(__file__).parent.parent.parent
# The second of two processes that torchrun started on this machine.
SECOND = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
# Several blocks, and one batch of all of them unless it is said otherwise.
SETTINGS = {"collect": {"block_samples": 8, "optimizer": "adam", "lr": 0.01, "steps": 3}}


@dataclass(frozen=True)
class Seen:
    """A command that ran on pretended GPUs: what it said, and what the GPUs report."""

    stderr: str
    report: str

    def waits(self, place: str) -> int:
        """How often the GPU was waited for in files whose path contains this."""
        lines = self.report.split("the host waited")[1].split("copies:")[0].splitlines()[1:]
        return sum(int(line.split()[0].replace(",", "")) for line in lines if place in line)

    @property
    def allocations(self) -> int:
        """How often memory of the GPU was asked for."""
        return int(re.search(r"allocations ([\d,]+)", self.report).group(1).replace(",", ""))


@pytest.fixture
def pretended(tmp_path):
    """Runs a command where torch sees two GPUs: `pretended(folder, "collect", code=0)`; allocations `oom_at`, of `oom_bytes` at
    least, fail. Without pretend_cuda.py the test is skipped."""
    program = Path(os.environ.get("OCD_PRETEND_CUDA") or ROOT.parent / "shared" / "pretend_cuda" / "pretend_cuda.py")
    if not program.is_file():
        pytest.skip(f"{program} is not there to pretend GPUs; name pretend_cuda.py with OCD_PRETEND_CUDA")

    def run(folder, *args, code=0, oom_at=(), oom_bytes=1, environment=None):
        report = tmp_path / "report.txt"
        options = ["--devices", 2, "--report", report, "--oom-bytes", oom_bytes, *(f"--oom-at={number}" for number in oom_at)]
        words = [sys.executable, program, *options, "-m", "ocd_cli", *args, "--config", folder.config, "--device", "cuda"]
        variables = os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {})
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, env=variables, cwd=ROOT)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr and "fault in ocd itself" not in done.stderr, done.stderr
        found = Seen(done.stderr, report.read_text())
        assert "was changed before" not in found.report, found.report
        return found

    return run


@pytest.fixture(scope="module")
def collected_on_cpu(make_run):
    """A project done through collect on a CPU; not to be changed."""
    return make_run(SETTINGS, until="collect")


@pytest.fixture
def ready(collected_on_cpu, tmp_path):
    """A copy, about to collect."""
    return collected_on_cpu.copy(tmp_path / "ready").without("collect")


@pytest.fixture
def whole(collected_on_cpu, ocd):
    """Asserts that a store holds what the CPU's holds."""

    def check(folder):
        found, wanted = store(folder), store(collected_on_cpu)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=2e-5, err_msg=name)
        ocd(folder, "verify")

    return check


def test_blocks_of_a_second_process_have_arrived_when_they_are_written(ready, pretended, whole):
    # Two parts: torchrun's processes are given one each.
    pretended(ready, "collect", "--part", "2/2", environment=SECOND)
    assert len(blocks_of(ready)) == 2
    pretended(ready, "collect", "--part", "1/2")
    whole(ready)


def test_few_waits(ready, pretended, whole):
    seen = pretended(ready, "collect", "--set", "collect.batch_size=8")
    whole(ready)
    blocks = 5
    # Labels were looked at on the CPU, batches are copied by the GPU itself.
    assert seen.waits("losses.py") == seen.waits("trees.py") == 0
    # By the writers, for their block.
    assert seen.waits("filling.py") == blocks
    # The same checks are made once more before the work begins.
    for place in ("descent.py", "overfit.py"):
        assert seen.waits(place) <= blocks + 4
    assert seen.waits("collector.py") == 0


def test_several_blocks_to_a_batch(ready, pretended, whole):
    few, many = (pretended(ready.copy(ready.root.parent / name), "collect", *more) for name, more in WAYS.items())
    assert few.waits("overfit.py") < many.waits("overfit.py")
    for name in WAYS:
        whole(type(ready)(ready.root.parent / name))


WAYS = {"all of them": [], "one": ["--set", "collect.batch_size=8"]}


def test_a_batch_goes_over_those_blocks_alone_that_are_not_done(ready, pretended, ocd, whole):
    ocd(ready, "collect", "--part", "2/2")
    pretended(ready, "collect")
    whole(ready)


# Of three numbers a row of the layer, and of six columns: a batch's deltas.
BATCH_BYTES = 36 * 3 * 6 * 4


# Half of the 36 that there are.
def test_memory_that_runs_out_once_halves_the_batch(ready, pretended, whole):
    seen = pretended(ready, "collect", oom_at=[1], oom_bytes=BATCH_BYTES)
    assert "the GPU's memory ran out: it goes on in batches of 18" in seen.stderr
    assert ready.manifest("collect")["execution"]["batch_size"] == 18
    whole(ready)


def test_memory_that_runs_out_for_good_loses_nothing(ready, pretended, ocd, whole):
    one_block = ["--set", "collect.batch_size=8"]
    unbroken = pretended(ready.copy(ready.root.parent / "unbroken"), "collect", *one_block)
    # From somewhere in the last blocks on.
    late = unbroken.allocations - 300
    seen = pretended(ready, "collect", *one_block, code=1, oom_at=range(late, late + 3000))
    assert "it goes on in batches of 1\n" in seen.stderr
    assert "out of memory" in seen.stderr.split("error: ")[1]
    assert len(blocks_of(ready)) > 1
    assert "continues: " in ocd(ready, "collect").stderr
    whole(ready)


def test_a_label_that_cannot_be_is_named_as_on_a_cpu(project, pretended, ocd):
    folder = project(SETTINGS, until="select-layer")
    x, y = arrays(40, 0)
    y[7] = 5
    folder.save("train.npz", x, y)
    said = []
    for run in (pretended, ocd):
        found = run(folder, "train-base", "--force", code=2)
        said.append(re.search(r"error: .*", found.stderr).group())
    assert said[0] == said[1]
    assert "label 5 is out of range" in said[0]
