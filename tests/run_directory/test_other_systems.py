"""What macOS and Windows lack is taken away, and the commands work all the same."""

import os

import pytest
from elsewhere import MACOS, WINDOWS, ocd_where
from folders import results

from stages.foundation.processes import cores


@pytest.mark.parametrize("system", [MACOS, WINDOWS], ids=["macOS", "Windows"])
def test_another_system(ready, whole, system):
    assert "Usage: ocd" in ocd_where(system, ready, "--help").stdout
    before = results(ready, "select-layer")
    ocd_where(system, ready, "run", "--until", "collect")
    assert "collect" in ocd_where(system, ready, "status", "--quiet").stdout
    ocd_where(system, ready, "select-layer", "--force")
    assert results(ready, "select-layer") == before
    whole(ready)


def test_cores(monkeypatch):
    assert cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores() == 1
