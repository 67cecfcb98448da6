"""Parts of a run directory that users have put on another disk, with a link in their place."""

import shutil
import subprocess

import pytest
from folders import states, status
from processes import before, interrupt, stopped_at

from stages.run_directory import folders


@pytest.fixture(params=["collect", "train-scale", "infer/test"])
def linked(request, finished, tmp_path):
    """A finished project one of whose folders lies elsewhere: project, stage, link and target."""
    name = request.param
    link, target = finished.run / name, tmp_path / "big disk" / name.replace("/", "-")
    target.parent.mkdir()
    shutil.move(link, target)
    link.symlink_to(target)
    return finished, name.split("/")[0], link, target


def made(place):
    """What a stage's folder holds, but for what tells of time."""
    files = [path for path in place.rglob("*") if path.is_file() and path.name not in ("manifest.json", "log.txt")]
    return {path.relative_to(place): path.read_bytes() for path in files}


def is_whole(ocd, folder, link, target):
    """The link is one, what it leads to is finished, and nothing is left beside either."""
    assert link.is_symlink()
    assert link.resolve() == target
    assert list(target.parent.iterdir()) == [target]
    assert not [path for path in folder.run.rglob("*") if path.suffix in (".wip", ".old")]
    ocd(folder, "verify")


def test_redone_it_lies_where_it_lay(linked, ocd):
    folder, stage, link, target = linked
    assert set(states(ocd, folder).values()) == {"done"}
    inode, first = target.stat().st_ino, made(target)
    ocd(folder, stage, "--force")
    assert target.stat().st_ino != inode
    assert made(target) == first != {}
    is_whole(ocd, folder, link, target)


def test_a_kill_between_the_two_renames(linked, ocd):
    folder, stage, link, target = linked
    target.rename(target.with_name(f"{target.name}.old"))
    assert states(ocd, folder)[stage] == "done"
    ocd(folder, stage, "--force")
    is_whole(ocd, folder, link, target)


def test_unfinished_it_lies_beside_the_target(collected, ocd, tmp_path, collected_run):
    link, target = collected.run / "collect", tmp_path / "big" / "collect"
    target.mkdir(parents=True)
    shutil.rmtree(link)
    link.symlink_to(target)
    # Empty, as a user makes it beforehand, it is missing.
    assert states(ocd, collected)["collect"] == "missing"
    with stopped_at(4):
        ocd(collected, "collect", code=4)
    assert (states(ocd, collected)["collect"], link.is_symlink()) == ("partial", True)
    assert len(list((tmp_path / "big" / "collect.wip" / "blocks").iterdir())) == 4
    with before(folders.StageFolder, "exchange", interrupt):
        ocd(collected, "collect", code=4)
    ocd(collected, "collect")
    assert made(target) == made(collected_run.run / "collect")
    is_whole(ocd, collected, link, target)


def test_a_run_directory_elsewhere(finished, ocd, tmp_path):
    target = tmp_path / "elsewhere"
    shutil.move(finished.run, target)
    finished.run.symlink_to(target)
    ocd(finished, "collect", "--force")
    assert finished.run.is_symlink()
    assert (target / "collect" / "manifest.json").is_file()
    ocd(finished, "verify")


# Refused


@pytest.mark.parametrize("words", [[], ["--force"]], ids=["plain", "forced"])
def test_a_stage_that_leads_nowhere(linked, ocd, words):
    """Perhaps its disk is not mounted: nothing is made in its place."""
    folder, stage, link, target = linked
    shutil.rmtree(target)
    says = f"{link} is a link to {target}, which does not exist"
    result = ocd(folder, stage, "--quiet", *words, code=3)
    assert result.stderr.startswith(f"error: {says}\n  mount its disk, or make the folder: mkdir -p '{target}'\n")
    assert status(ocd, folder)[stage]["detail"] == says
    assert not list(target.parent.iterdir())


def test_a_store_that_is_a_link(finished, ocd, tmp_path):
    """It is never replaced by data on this disk, and what is to be typed works."""
    link, target = finished.run / "collect" / "deltas.zarr", tmp_path / "big" / "deltas.zarr"
    target.parent.mkdir()
    shutil.move(link, target)
    link.symlink_to(target)
    for words in ([], ["--force"]):
        result = ocd(finished, "collect", "--quiet", *words, code=3)
        assert f"error: {link} leads out of {link.parent}, to {target}: a stage's folder may be a link" in result.stderr
    assert link.is_symlink()
    subprocess.run(["sh", "-c", result.stderr.split("with the whole folder: ")[1]], check=True)
    assert "collect: up to date" in ocd(finished, "collect").stdout
    ocd(finished, "collect", "--force")
    assert (finished.run / "collect").resolve() == tmp_path / "big" / "deltas.zarr.collect"
    ocd(finished, "verify")
