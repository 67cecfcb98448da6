"""Standard output and error that are closed, full, read by nobody or of another encoding; a working directory that is gone."""

import os
import subprocess
import sys

import pytest
from elsewhere import ROOT

NO_ROOM = (
    "error: standard output cannot be written: No space left on device\n"
    "  make room, or send it elsewhere; then run the same command again\n"
)


@pytest.fixture
def shell(finished):
    """Runs a line in the project's folder, `ocd` being the command; no traceback is shown."""

    def call(line, **options):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = f'ocd() {{ "{sys.executable}" -m ocd_cli "$@"; }}\n{line}'
        result = subprocess.run(["bash", "-c", command], cwd=finished.root, env=environment, **{"encoding": "utf-8", **options})
        for text in (result.stdout or "", result.stderr or ""):
            assert "Traceback" not in text
            assert "a fault in ocd itself" not in text
            assert "Exception ignored" not in text
        return result

    return call


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("words", ["status", "--help"])
def test_closed_streams(shell, words, closed):
    result = shell(f"ocd {words} {closed}", capture_output=True)
    assert result.returncode == 0
    assert (result.stdout == "") == (closed != "2>&-")
    assert result.stderr == "" or "2>&-" not in closed


def test_work_does_not_go_where_a_stream_was(shell, finished, ocd):
    """The first file opened would be given the number of a stream that is closed."""
    assert shell("ocd run --force --until collect >&- 2>&-").returncode == 0
    ocd(finished, "verify")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", ["status", "--help", "nonsense"])
def test_nobody_reads(shell, words, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    line = f"PYTHONUNBUFFERED={unbuffered} ocd {words}"
    code = 2 if words == "nonsense" else 0
    assert shell(line, stdout=writing, stderr=subprocess.PIPE).returncode == code
    assert shell(line, stdout=writing, stderr=writing).returncode == code
    os.close(writing)


def test_the_work_is_done_whoever_reads(shell, ocd, finished):
    assert shell("ocd train-scale --force 2>&1 | true; ocd train-scale --force 2> /dev/full | head -1").returncode == 0
    ocd(finished, "verify")
    assert "train-scale: up to date" in ocd(finished, "train-scale").stdout


@pytest.mark.parametrize("words", ["status", "status --json", "--help"])
def test_no_room_for_results(shell, words):
    result = shell(f"ocd {words} > /dev/full", stderr=subprocess.PIPE)
    assert result.returncode == 4
    assert result.stderr.endswith(NO_ROOM)
    assert shell(f"ocd {words} 2> /dev/full", stdout=subprocess.PIPE).stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_cannot_be_written(shell, encoding):
    result = shell(f"PYTHONIOENCODING={encoding}:strict ocd run", stdout=subprocess.PIPE, encoding=encoding)
    assert result.returncode == 0
    assert "????" in result.stdout
    assert f"24 inputs {'?' if encoding == 'ascii' else '×'} 2 members" in result.stdout
    assert "infer: up to date" in result.stdout


@pytest.mark.parametrize("words", ["status", "init", "run", "status --config ../ocd.toml"])
def test_a_working_directory_that_is_gone(shell, words):
    result = shell(f"mkdir gone && cd gone && rmdir ../gone && ocd {words}", capture_output=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "error: the working directory is gone (No such file or directory)\n  go to a folder that exists: cd FOLDER\n"
    )


@pytest.mark.parametrize("words", ["status", "run", "verify", "probe"])
def test_a_run_directory_that_leads_nowhere(finished, ocd, tmp_path, words):
    link, target = tmp_path / "link", tmp_path / "elsewhere" / "run"
    link.symlink_to(target)
    result = ocd(finished, words, "--quiet", "--run", link, code=3)
    assert result.stderr == (
        f"error: {link} is a link to {target}, which does not exist\n  mount its disk, or make the folder: mkdir -p {target}\n"
    )
    target.mkdir(parents=True)
    ocd(finished, "train-base", "--run", link)
    assert (target / "train-base" / "manifest.json").exists()
