"""What stops collect from outside: another process at the same store, a dataset that raises, a request to terminate."""

import re
import signal

import pytest
from folders import blocks_of, results
from processes import INTERRUPTED, redone, wait_until


def test_two_collects_at_once(ready, start, ocd, whole):
    first = start(ready, "collect", held_after=1)
    wait_until(lambda: blocks_of(ready))
    result = ocd(ready, "collect", "--quiet", code=4)
    assert re.fullmatch(
        rf"error: collect is in use by process {first.pid} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\n"
        r"  wait for it to end, then run the same command again\n",
        result.stderr,
    )
    assert result.stdout == ""
    first.let_go().wait()
    assert "collect: up to date" in ocd(ready, "collect").stdout
    whole(ready)


@pytest.fixture(scope="module")
def with_dataset(make_run):
    """1,000 samples from code, in 20 blocks, about to collect; not to be changed."""
    settings = {
        "run": {"seed": 2},  # sample 731 is then in block 13
        "task": {"train": "data:Rows"},
        "collect": {"split": "all", "block_samples": 50, "batch_size": 10},
    }
    return make_run(settings, "models", "collect", rows=1000)


@pytest.mark.parametrize("part", [[], ["--part", "2/2"]], ids=["plain", "a part"])
def test_a_dataset_that_raises(with_dataset, ocd, tmp_path, part):
    folder = with_dataset.copy(tmp_path / "project").without("collect")
    (folder.root / "unreadable.json").write_text("[731]")
    if part:
        ocd(folder, "collect", "--part", "1/2")
    lines = (folder.root / "data.py").read_text().splitlines()
    place = next(number for number, line in enumerate(lines, 1) if "raise OSError" in line)
    result = ocd(folder, "collect", "--quiet", *part, code=2)
    assert result.stderr == (
        "error: train[731] raised OSError: the picture is gone\n"
        f'  data.py, line {place}, in __getitem__: raise OSError("the picture is gone")\n'
        "  mend it, then run the same command again\n"
    )
    done = {int(path.stem) for path in blocks_of(folder)}
    assert done == set(range(13)) | set(range(0, 20, 2) if part else [])
    (folder.root / "unreadable.json").unlink()
    assert redone(ocd, folder, "collect") == sorted(set(range(20)) - done)
    assert results(folder, "collect") == results(with_dataset, "collect")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU])
def test_a_request_to_end(ready, start, ocd, whole, number):
    process = start(ready, "collect", "--quiet", held_after=2)
    wait_until(lambda: len(blocks_of(ready)) >= 2)
    process.kill(number)
    assert process.wait(4).stderr == INTERRUPTED.format("collect")
    kept = len(blocks_of(ready))
    assert 2 <= kept < 9
    assert not list(ready.run.rglob("*.tmp"))
    ocd(ready, "verify")
    assert len(redone(ocd, ready, "collect")) == 9 - kept
    whole(ready)


def test_a_terminal_that_goes_away_under_nohup(ready, start, whole):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start(ready, "collect", "--quiet", held_after=2)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_until(lambda: len(blocks_of(ready)) >= 2)
    process.kill(signal.SIGHUP)
    process.let_go().wait()
    whole(ready)


def test_a_request_that_is_repeated(ready, start):
    """SIGXCPU comes every second, also while the first one is obeyed."""
    process = start(ready, "collect", "--quiet", held_after=2)
    wait_until(lambda: len(blocks_of(ready)) >= 2)
    while not process.ended():
        process.kill(signal.SIGXCPU)
    assert process.wait(4).stderr.startswith("error: collect was interrupted; what is finished is kept\n")
