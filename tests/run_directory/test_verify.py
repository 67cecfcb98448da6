"""`ocd verify` hashes everything again, and names what is damaged."""

import json
import shutil

import pytest
from damage import HARM, kept_time
from folders import flip


@pytest.fixture
def problems(ocd):
    """What verify finds wrong, by stage, where it must find something."""

    def call(folder):
        found = ocd.json(folder, "verify", code=3)
        assert found["whole"] is False
        return {name: " ".join(entry["problems"]) for name, entry in found["stages"].items() if entry["problems"]}

    return call


def edit(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record, indent=1))


def test_whole_run(finished, ocd):
    before = finished.files()
    found = ocd.json(finished, "verify")
    assert found["whole"] is True
    assert list(found["stages"]) == ["train-base", "select-layer", "collect", "train-diffusion", "train-scale", "infer/test"]
    assert all(entry["files"] and entry["bytes"] and not entry["problems"] for entry in found["stages"].values())
    text = ocd(finished, "verify").stdout
    assert text.count("whole") == 6
    assert finished.files() == before


def test_no_run(project, ocd):
    assert "ocd run" in ocd(project(), "verify", code=3).stderr


FILES = [
    ("train-base", "base.safetensors"),
    ("select-layer", "layer.json"),
    ("collect", "deltas.zarr/delta/c.0.0.0"),
    ("collect", "deltas.zarr/rho/zarr.json"),
    ("collect", "blocks/000000.json"),
    ("train-diffusion", "denoiser.safetensors"),
    ("train-diffusion", "metrics.jsonl"),
    ("train-scale", "scale.safetensors"),
    ("infer/test", "predictions.npz"),
]


@pytest.mark.parametrize("damage", HARM)
@pytest.mark.parametrize(("stage", "name"), FILES)
def test_damage_is_named(finished, problems, ocd, stage, name, damage):
    path = finished.run / stage / name
    (kept_time(flip) if damage == "flipped byte" else HARM[damage])(path)
    found = problems(finished)
    assert list(found) == [stage]
    assert name in found[stage]
    assert name in ocd(finished, "verify", code=3).stdout


def test_stray_file(finished, problems, ocd):
    (finished.run / "collect" / "deltas.zarr" / "delta" / "c.9").write_text("")
    assert "--force" in ocd(finished, "verify", code=3).stderr
    assert problems(finished) == {"collect": "collect/deltas.zarr/delta/c.9 is not in the manifest"}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("a setting", lambda m: m["identity"]["settings"].update({"collect.lr": 0.5})),
        ("an input", lambda m: m["identity"]["inputs"].update(base="0" * 64)),
        ("the fingerprint", lambda m: m.update(fingerprint="0" * 64)),
        ("a hash", lambda m: m["files"]["blocks/000000.json"].update(sha256="0" * 64)),
        ("a file less", lambda m: m["files"].pop("blocks/000000.json")),
        ("the content", lambda m: m.update(content="0" * 64)),
        ("a figure", lambda m: m["summary"].update(rho=1.0)),
        ("an extent", lambda m: m["extents"]["collect.samples"].update(reached=9)),
        ("the store", lambda m: m["store"].update(samples=9)),
        ("no files", lambda m: m.pop("files")),
    ],
)
def test_changed_manifest(finished, problems, name, change):
    edit(finished.run / "collect" / "manifest.json", change)
    found = problems(finished)
    assert "collect" in found
    assert "manifest" in found["collect"] or "blocks/000000.json" in found["collect"]


def test_ledger_of_another_store(finished, problems):
    # Someone made the manifest agree with a record that is not this store's.
    record = finished.run / "collect" / "blocks" / "000000.json"
    edit(record, lambda r: r.update(fingerprint="0" * 64))
    found = problems(finished)["collect"]
    assert "blocks/000000.json is of another store" in found


def test_all_damage_at_once(finished, problems):
    flip(finished.run / "train-base" / "base.safetensors", keep_time=True)
    (finished.run / "train-scale" / "scale.json").unlink()
    (finished.run / "collect" / "manifest.json").write_text("{")
    assert list(problems(finished)) == ["train-base", "collect", "train-scale"]


def test_unfinished_work_is_no_damage(finished, ocd):
    shutil.move(finished.run / "train-scale", finished.run / "train-scale.wip")
    found = ocd.json(finished, "verify")
    assert "train-scale" not in found["stages"]


def test_other_answers_are_verified(finished, problems, ocd):
    ocd(finished, "infer", "--split", "validation", "--save-deltas")
    ocd(finished, "verify")
    flip(finished.run / "infer" / "validation" / "deltas.zarr" / "delta" / "zarr.json", keep_time=True)
    assert list(problems(finished)) == ["infer/validation"]
