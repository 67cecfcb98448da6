"""The Lego scene: downloaded once, checked, and refused where it is damaged."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scene_loading import counts, load_scene, scene_refusal, scenes
from serving import serving
from spheres import sphere_npz

from stages.foundation.errors import SettingsError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OCD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / scenes.LEGO


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves a scene at /good and half of it at /short; the example looks there, at /good unless told otherwise."""
    content = sphere_npz(tmp_path / "served.npz", size=2).read_bytes()
    with serving({"/good": content, "/short": content, "/page": b"<html>welcome</html>"}) as (url, requests):

        def look(*paths):
            monkeypatch.setattr(scenes, "LEGO_URLS", [f"{url}{path}" for path in paths])
            requests.clear()
            return requests

        look("/good")
        yield look


def test_the_lego_scene_is_downloaded_once(cache, server, tmp_path):
    requests = server("/short", "/good")
    assert counts(load_scene(None, tmp_path)) == (6, 6, 20)
    assert counts(load_scene(None, tmp_path)) == (6, 6, 20)
    assert requests == ["/short", "/good"]
    cache.write_bytes(sphere_npz(tmp_path / "other.npz", size=2, views=33).read_bytes())
    message, hint = scene_refusal(None, tmp_path)
    assert message.startswith(f"{cache} has changed: its sha256 is ")
    assert hint == f"delete it and {cache}.sha256 to download it again"
    assert requests == ["/short", "/good"]


def test_a_truncated_download_or_another_page_is_refused(cache, server, tmp_path):
    server("/short")
    assert "/short: " in scene_refusal(None, tmp_path)[0]
    assert not cache.exists()
    server("/page")
    message, hint = scene_refusal(None, tmp_path)
    assert message == f"{cache} is not an npz file that can be read: it holds no plain arrays"
    assert hint == f"delete it and {cache}.sha256 to download it again"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_inside_the_file_is_found(save, tmp_path, monkeypatch):
    monkeypatch.setenv("OCD_DATA", str(tmp_path))
    path = sphere_npz(tmp_path / scenes.LEGO, size=4)
    save(path, **np.load(path))
    load_scene(None, tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    message, hint = scene_refusal(None, tmp_path)
    assert message.startswith(f"{path} is not an npz file that can be read: ")
    assert hint == "replace it, or unset OCD_DATA to download it"


def test_a_checksum_may_be_demanded(cache, server, tmp_path, monkeypatch):
    wrong = "0" * 64
    assert "/good: SHA256 hash of downloaded file" in scene_refusal(None, tmp_path, sha256=wrong)[0]
    load_scene(None, tmp_path)
    right = Path(f"{cache}.sha256").read_text().split()[0]
    requests = server("/good")
    load_scene(None, tmp_path, sha256=right.upper())
    assert requests == []
    sphere_npz(tmp_path / scenes.LEGO, size=3)
    monkeypatch.setenv("OCD_DATA", str(tmp_path))
    assert load_scene(None, tmp_path).size == (3, 3)
    assert "has another sha256 than expected" in scene_refusal(None, tmp_path, sha256=right)[0]
    assert scene_refusal("a.npz", tmp_path, sha256=right, kind=SettingsError) == (
        "a sha256 is set, which is for the downloaded scene, but the source is a.npz",
        "leave it out",
    )


def test_the_real_lego_scene(tmp_path, real_data):
    real_data(scenes.LEGO)
    scene = load_scene(None, tmp_path)
    assert counts(scene) in {(100, 6, 20), (80, 6, 20)}  # with a test part of its own, and as published
    assert scene.size == (100, 100)
    assert scene.notes == ()
    # Cameras stand 4.03 from the origin and look at it; most of a picture is background.
    for views in (scene.train, scene.validation, scene.test):
        middle = views.rays[:, [4949, 4950, 5049, 5050]].mean(1)
        distance = middle[:, :3].norm(dim=1)
        torch.testing.assert_close(distance, torch.full_like(distance, 4.03), atol=0.01, rtol=0)
        torch.testing.assert_close(middle[:, 3:], -middle[:, :3] / distance[:, None], atol=1e-3, rtol=0)
        assert 0.5 < (views.colours == 0).all(-1).float().mean() < 0.8
