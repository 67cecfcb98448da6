"""A run directory on a file system without locks, such as Lustre mounted without the option flock."""

import pytest
from elsewhere import no_flock, ocd_where
from folders import results

from stages.run_directory.folders import StageFolder
from stages.run_directory.locks import Part, held, holders

HINT = "mount it with the option flock (Lustre), name a folder elsewhere with --run, or leave out --part"


@pytest.mark.parametrize("number", [38, 37, 95], ids=["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_it_works_alone_after_one_warning(finished, number):
    result = ocd_where(no_flock(number), finished, "run", "--force", "--until", "select-layer")
    assert result.stderr.count("has no locks") == 1
    assert f"warning: the file system of {finished.run} has no locks" in result.stderr
    assert "mount option flock" in result.stderr
    assert "in use by" not in ocd_where(no_flock(number), finished, "status").stdout


def test_parts_and_what_comes_of_one_alone(ready, whole):
    refused = ocd_where(no_flock(38), ready, "collect", "--part", "1/2", "--quiet", code=2)
    assert refused.stderr == (
        f"error: --part 1/2: the file system of {ready.run} has no locks (Function not implemented), "
        f"without which parts cannot be told apart\n  {HINT}\n"
    )
    ocd_where(no_flock(38), ready, "collect", "--part", "1/1")
    whole(ready)


# With locks


def test_a_lock_is_not_taken_for_its_file(tmp_path):
    """A file left by a process that was killed holds nothing, and names nobody."""
    with held(tmp_path, "collect"):
        files = {path: path.read_bytes() for path in (tmp_path / ".locks").iterdir()}
        assert len(holders(tmp_path, "collect")) == 1
    for path, data in files.items():
        path.write_bytes(data)
    assert holders(tmp_path, "collect") == []
    with held(tmp_path, "collect", Part(2, 3)):
        assert [text[-11:] for text in holders(tmp_path, "collect")] == [" (part 2/3)"]


def test_looking_changes_nothing(tmp_path):
    assert holders(tmp_path, "collect") == []
    assert not list(tmp_path.iterdir())
    with held(tmp_path, "collect"):
        before = {path: path.read_bytes() for path in (tmp_path / ".locks").iterdir()}
        holders(tmp_path, "collect")
        assert {path: path.read_bytes() for path in (tmp_path / ".locks").iterdir()} == before


def test_a_part_of_one_is_the_whole(finished, ocd):
    with StageFolder(finished.run, "collect").lock():
        assert "collect is in use by process" in ocd(finished, "collect", "--force", "--part", "1/1", code=4).stderr
    before = results(finished, "collect")
    ocd(finished, "collect", "--force", "--part", "1/1")
    assert results(finished, "collect") == before
