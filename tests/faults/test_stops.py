"""What stops collect from outside: another process at the same store, a dataset that raises, a request to terminate."""

import re
import shutil
import signal

import pytest
from conftest import Folder, blocks_of, counted_blocks, make_folder, results, wait_until

DATA = """

import pathlib
from stages.tasks.data import load_npz


class Rows:
    def __init__(self):
        self.root = pathlib.Path(__file__).parent
        self.data = load_npz(self.root / "train.npz", labels=True)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if index == 731 and (self.root / "broken").exists():
            raise OSError("the picture is gone")
        return self.data[index]
"""


def test_two_collects_at_once(ready, start, ocd, whole):
    first = start(ready, "collect", delay=0.02)
    wait_until(lambda: blocks_of(ready))
    result = ocd(ready, "collect", "--quiet", code=4)
    assert re.fullmatch(
        rf"error: collect is in use by process {first.pid} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\n"
        r"  wait for it to end, then run the same command again\n",
        result.stderr,
    )
    assert result.stdout == ""
    first.wait()
    assert "collect: up to date" in ocd(ready, "collect").stdout
    whole(ready)


@pytest.fixture(scope="module")
def with_dataset(tmp_path_factory, ocd):
    """1,000 samples from code, in 20 blocks, about to collect; not to be changed."""
    settings = {
        "run": {"seed": 2},  # sample 731 is then in block 13
        "task": {"train": "data:Rows"},
        "collect": {"split": "all", "block_samples": 50, "batch_size": 10},
    }
    folder = make_folder(tmp_path_factory.mktemp("dataset") / "project", settings, rows=1000)
    (folder.root / "data.py").write_text(DATA)
    ocd(folder, "run", "--until", "collect")
    return folder


@pytest.mark.parametrize("part", [[], ["--part", "2/2"]], ids=["plain", "a part"])
def test_a_dataset_that_raises(with_dataset, ocd, tmp_path, part):
    shutil.copytree(with_dataset.root, tmp_path / "project")
    folder = Folder(tmp_path / "project")
    shutil.rmtree(folder.run / "collect")
    (folder.root / "broken").touch()
    if part:
        ocd(folder, "collect", "--part", "1/2")
    result = ocd(folder, "collect", "--quiet", *part, code=2)
    assert result.stderr == (
        "error: train[731] raised OSError: the picture is gone\n"
        '  data.py, line 17, in __getitem__: raise OSError("the picture is gone")\n'
        "  mend it, then run the same command again\n"
    )
    done = {int(path.stem) for path in blocks_of(folder)}
    assert done == set(range(13)) | set(range(0, 20, 2) if part else [])
    (folder.root / "broken").unlink()
    with counted_blocks() as written:
        ocd(folder, "collect")
    assert sorted(written) == sorted(set(range(20)) - done)
    assert results(folder, "collect") == results(with_dataset, "collect")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_end(ready, start, ocd, whole, number):
    process = start(ready, "collect", "--quiet", delay=0.05)
    wait_until(lambda: len(blocks_of(ready)) >= 2)
    process.kill(number)
    assert process.wait(4).stderr == (
        "error: collect was interrupted; what is finished is kept\n  to continue, run the same command again\n"
    )
    kept = len(blocks_of(ready))
    assert 2 <= kept < 9
    assert not list(ready.run.rglob("*.tmp"))
    ocd(ready, "verify")
    with counted_blocks() as written:
        ocd(ready, "collect")
    assert len(written) == 9 - kept
    whole(ready)
