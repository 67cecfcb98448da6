"""Fetching data files, against a server on this machine."""

import hashlib
import re
import sys

import pytest
from refusals import refusal
from serving import serving

from stages.foundation.errors import DataError, SettingsError
from stages.tasks.fetch import fetch

CONTENT = b"a data set, as far as this test is concerned" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = "toy/data.gz"


@pytest.fixture
def server():
    """Serves CONTENT at /good, other bytes at /bad, half of CONTENT at /short, and nothing elsewhere; counts requests."""
    with serving({"/good": CONTENT, "/bad": b"something else", "/short": CONTENT}) as served:
        yield served


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OCD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def place(folder, content):
    (folder / "toy").mkdir(parents=True)
    (folder / NAME).write_bytes(content)


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_downloads_once_then_takes_the_cache(server, cache):
    url, requests = server
    assert fetch(NAME, [f"{url}/good"], SHA256).read_bytes() == CONTENT
    assert fetch(NAME, [f"{url}/good"], SHA256) == cache / NAME
    assert requests == ["/good"]


@pytest.mark.parametrize("first", ["bad", "short", "missing"])
def test_a_mirror_that_fails_is_followed_by_the_next(server, cache, first):
    url, requests = server
    assert fetch(NAME, [f"{url}/{first}", f"{url}/good"], SHA256).read_bytes() == CONTENT
    assert requests == [f"/{first}", "/good"]
    assert files(cache) == [cache / NAME]


def test_no_good_mirror_leaves_nothing_and_says_why(server, cache):
    url, _ = server
    message, hint = refusal(DataError, fetch, NAME, [f"{url}/bad", f"{url}/missing"], SHA256)
    assert f"{url}/bad: SHA256 hash of downloaded file (data.gz) does not match" in message
    assert "404" in message
    assert str(cache / NAME) in hint
    assert files(cache) == []


def test_a_damaged_cache_is_downloaded_again(server, cache):
    url, _ = server
    place(cache, b"half")
    assert fetch(NAME, [f"{url}/good"], SHA256).read_bytes() == CONTENT


def test_ocd_data_comes_first_and_is_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("OCD_DATA", str(tmp_path))
    place(tmp_path, CONTENT)
    assert fetch(NAME, [], SHA256) == tmp_path / NAME
    (tmp_path / NAME).write_bytes(b"other")
    with pytest.raises(DataError, match="another sha256"):
        fetch(NAME, [], SHA256)


def test_without_pooch_nothing_is_downloaded(server, cache, monkeypatch):
    url, requests = server
    monkeypatch.setitem(sys.modules, "pooch", None)
    assert refusal(SettingsError, fetch, NAME, [f"{url}/good"], SHA256)[1] == 'pip install "torch-ocd[examples]"'
    assert requests == []
    place(cache, CONTENT)
    assert fetch(NAME, [], SHA256) == cache / NAME


def test_a_truncated_download_is_told_by_its_length(server, cache):
    url, _ = server
    for sha256 in (SHA256, None):
        message, _ = refusal(DataError, fetch, NAME, [f"{url}/short"], sha256)
        assert re.search(rf"/short: .*IncompleteRead\({len(CONTENT) // 2} bytes read", message)
    assert files(cache) == []


def test_without_a_checksum_the_first_download_s_is_recorded_and_demanded(server, cache):
    url, requests = server
    path, record = cache / NAME, cache / f"{NAME}.sha256"
    assert fetch(NAME, [f"{url}/short", f"{url}/good", f"{url}/bad"], None) == path
    assert record.read_text() == f"{SHA256}  data.gz\n"
    assert sorted(files(cache)) == [path, record]
    assert fetch(NAME, [], None).read_bytes() == CONTENT
    path.write_bytes(b"other")
    other = hashlib.sha256(b"other").hexdigest()
    assert refusal(DataError, fetch, NAME, [f"{url}/good"], None) == (
        f"{path} has changed: its sha256 is {other[:12]}…, {SHA256[:12]}… was recorded when it was new",
        f"delete it and {record} to download it again",
    )
    assert requests == ["/short", "/good"]
    path.unlink()
    with pytest.raises(DataError, match=rf"/bad: SHA256 .* expected sha256:{SHA256}") as error:
        fetch(NAME, [f"{url}/bad"], None)
    assert str(record) in error.value.hint
    record.unlink()
    assert fetch(NAME, [f"{url}/bad"], None).read_bytes() == b"something else"


def test_without_a_checksum_a_file_put_into_the_cache_is_recorded_when_first_used(cache):
    place(cache, CONTENT)
    assert fetch(NAME, [], None) == cache / NAME
    assert (cache / f"{NAME}.sha256").read_text().split() == [SHA256, "data.gz"]


def test_a_checksum_given_later_outranks_the_recorded_one(server, cache):
    url, _ = server
    assert fetch(NAME, [f"{url}/bad"], None).read_bytes() == b"something else"
    assert fetch(NAME, [f"{url}/good"], SHA256).read_bytes() == CONTENT
    assert fetch(NAME, [], None).read_bytes() == CONTENT


def test_without_a_checksum_ocd_data_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("OCD_DATA", str(tmp_path))
    place(tmp_path, b"anything")
    assert fetch(NAME, [], None) == tmp_path / NAME
    assert sorted(files(tmp_path)) == [tmp_path / NAME]
