"""The records of a run directory: what is read back is what was written, and a field that cannot be is named."""

import json

import pytest
from refusals import refusal

from stages.foundation.errors import ArtifactError
from stages.run_directory.descriptions import DenoiserDescription
from stages.run_directory.format import (
    FORMAT_VERSION,
    BlockRecord,
    ChunkRecord,
    Identity,
    Manifest,
    RunRecord,
)

CHUNK = ChunkRecord(bytes=3, sha256="ab")


def block(**changed):
    fields = {"fingerprint": "f", "block": 0, "samples": [0, 4], "chunks": {"c.0": CHUNK}}
    return BlockRecord.hashed(**fields | changed)


@pytest.mark.parametrize("record", [block(), block(members=5), block(sums={"rho": 1.5}, skipped=[3])])
def test_a_record_is_read_back(record, tmp_path):
    path = tmp_path / "record.json"
    record.write(path)
    found = BlockRecord.read(path)
    assert found == record
    assert found.sha256 == found.found_hash()
    # Fields that were not given are not written.
    assert ("members" in json.loads(path.read_text())) == ("members" in record.model_fields_set)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(block="0"), "block is '0': input should be a valid integer"),
        (lambda raw: raw.pop("chunks"), "chunks is missing"),
        (lambda raw: raw["chunks"]["c.0"].update(bytes=None), "chunks.c.0.bytes is None: input should be a valid integer"),
        (lambda raw: raw.update(color="red"), "color is 'red': extra inputs are not permitted"),
        (lambda raw: (raw.pop("block"), raw.pop("samples")), "block is missing (and 1 more problems)"),
    ],
)
def test_a_field_that_cannot_be_is_named(change, message, tmp_path):
    path = tmp_path / "000000.json"
    raw = block().as_json()
    change(raw)
    path.write_text(json.dumps(raw))
    assert refusal(ArtifactError, BlockRecord.read, path)[0] == f"{path}: {message}"


def test_a_description_of_a_denoiser_that_is_not_understood(tmp_path):
    path = tmp_path / "denoiser.json"
    given = {
        "preset": "mlp",
        "width": 16,
        "blocks": 2,
        "prediction": "x0",
        "shape": [3, 4],
        "fields": {"a": 2},
        "schedule": "ddpm",
    }
    path.write_text(json.dumps(given))
    assert DenoiserDescription.read(path).as_json() == given
    path.write_text(json.dumps(given | {"preset": "unet9"}))
    with pytest.raises(ArtifactError, match="preset is 'unet9': input should be 'mlp', 'factored', 'vector', 'paper', "):
        DenoiserDescription.read(path)
    for name in given:
        path.write_text(json.dumps({key: value for key, value in given.items() if key != name}))
        with pytest.raises(ArtifactError, match=f"{name} is missing"):
            DenoiserDescription.read(path)


@pytest.mark.parametrize("raw", [[], 3, None, "text"])
def test_what_is_no_record_at_all(raw, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match=r"run\.json: it is "):
        RunRecord.read(path)


def test_another_version_is_told_before_anything_else(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"identity": {"format_version": 1}, "of another": "shape"}))
    with pytest.raises(ArtifactError, match=f"has format version 1, expected {FORMAT_VERSION}$"):
        Manifest.read(path)


def test_the_fingerprint_depends_on_every_part():
    identity = Identity(format_version=FORMAT_VERSION, stage="collect", settings={"collect.lr": 0.1}, inputs={"base": "ab"})
    others = [
        identity.changed(stage="infer"),
        identity.changed(settings={"collect.lr": 0.2}),
        identity.changed(inputs={"base": "ac"}),
    ]
    assert len({one.fingerprint for one in (identity, *others)}) == 4
    again = Identity(inputs={"base": "ab"}, settings={"collect.lr": 0.1}, stage="collect", format_version=FORMAT_VERSION)
    assert again.fingerprint == identity.fingerprint
