"""probe: tells headroom from none before anything is trained, and writes nothing."""

import math
import os
import shlex

import numpy as np
import pytest
from folders import put, toml
from planted import HELPING, HOPELESS

from stages.evaluation import small_run
from stages.foundation.config import tables
from stages.run_directory.project import load_project

ROWS = {
    "base",
    "overfitted on test",
    "nearest neighbour",
    "nearest neighbour in layer input",
    "nearest k blended",
    "nearest k blended in layer input",
    "random direction",
    "mean delta",
}


@pytest.fixture(scope="module")
def with_headroom(make_run):
    # Better than a constant, or it would be the base that is to be mended first.
    return make_run(HELPING | {"train-base": {"epochs": 20, "lr": 0.01, "batch_size": 100}}, "planted", "train-base")


@pytest.fixture(scope="module")
def without(make_run):
    return make_run(HOPELESS, "planted", "train-base")


def test_headroom_for_x(ocd, with_headroom):
    before = with_headroom.files()
    shown = ocd(with_headroom, "probe", "--quick")
    assert with_headroom.files() == before
    assert "headroom for x: with the deltas of nearest training samples " in " ".join(shown.stdout.split())
    *_, flags = shown.stdout.splitlines()
    assert flags.startswith("ocd run --set select-layer.layer=0.weight --set collect.optimizer=sgd --set collect.lr=")
    # What it ends with can be pasted: every command accepts it.
    words = shlex.split(flags)[2:]
    assert ocd(with_headroom, "select-layer", "--dry-run", *words)
    assert load_project(with_headroom.config, overrides=words[1::2]).settings.select_layer.layer == "0.weight"


def test_what_to_start_with_is_written_into_the_settings(ocd, with_headroom, tmp_path):
    folder = with_headroom.copy(tmp_path / "copy")
    folder.config.write_text("# mine\n" + folder.config.read_text().replace("lr = 0.3", "lr = 0.3  # bold"))
    before = folder.config.read_text()
    planned = ocd(folder, "probe", "--write", "--dry-run").stdout
    assert planned.endswith(f"nothing is written but what to start with, into {folder.config}\n")
    assert folder.config.read_text() == before
    # A flag that the trials had is part of what is recommended; the recommendation wins over one of the same name.
    shown = ocd(folder, "probe", "--quick", "--write", *put("collect.lr=1e-9", "collect.max_steps=7")).stdout
    start = load_project(folder.config).settings
    assert (start.select_layer.layer, start.collect.max_steps) == ("0.weight", 7)
    assert start.collect.lr in (0.005, 0.05, 0.002, 0.0005)
    assert folder.config.read_text().startswith("# mine\n")
    assert "  # bold" in folder.config.read_text()
    assert shown.endswith("next: ocd run\n")
    assert f"written into {folder.config}: select-layer.layer = 0.weight, " in shown


def test_a_settings_file_that_cannot_be_written_is_told_of_before_the_work(ocd, with_headroom, monkeypatch):
    monkeypatch.setattr(os, "access", lambda place, kind: kind != os.W_OK)
    shown = ocd(with_headroom, "probe", "--quick", "--write", code=2)
    assert shown.stderr.endswith(
        f"error: {with_headroom.config} cannot be written: Permission denied\n  make it writable, or leave out --write\n"
    )


def test_no_headroom_for_x_where_labels_know_nothing_of_it(ocd, without):
    found = ocd.json(without, "probe", "--quick")
    assert found["headroom"] == "labels"
    assert found["verdict"].startswith(
        "no headroom for x in sight: with the deltas of the true labels cross_entropy goes from "
    )
    assert found["warnings"] == []
    assert (found["start_with"], found["written"], found["next"]) == ({}, None, "")
    assert {entry["layer"] for entry in found["tried"]} == {"0.weight", "2.weight"}


def test_a_weak_base_comes_first(ocd, make_run):
    """After one epoch it is worse than a constant: whatever lowers its loss gains."""
    found = ocd.json(make_run(HELPING, "planted", "train-base"), "probe", "--quick", "--samples", 100)
    assert found["verdict"].startswith("mend the base first, which is worse than a constant; as it is, headroom for x: ")
    assert any(text.startswith("train-base: the base is worse than a constant: ") for text in found["warnings"])
    assert (found["start_with"], found["next"]) == ({}, "")


def test_no_headroom_at_all(ocd, without):
    found = ocd.json(without, "probe", "--quick", "--set", "collect.lr=1e-12", "--layer", "2.weight")
    mine = found["tried"][0]
    assert mine["settings"] == {"optimizer": "adam", "lr": 1e-12, "steps": 3}
    figures = {row["name"]: row["metrics"]["cross_entropy"]["mean"] for row in mine["rows"]}
    assert figures["overfitted on test"] == pytest.approx(figures["base"], abs=1e-6)


def test_what_it_finds_is_what_the_stages_do(ocd, without):
    """The loss with the true labels' deltas is that of collecting the same samples with the same settings."""
    found = ocd.json(without, "probe", "--quick", "--layer", "2.weight", "--samples", 1000)
    assert found["samples"] == 200
    (mine, *others) = found["tried"]
    assert mine["settings"] == {"optimizer": "adam", "lr": 0.005, "steps": 3}
    assert len(others) == 4
    for entry in found["tried"]:
        assert {row["name"] for row in entry["rows"]} == ROWS
        assert set(entry["strengths"]) == ROWS - {"base", "overfitted on test"}
        assert all(set(both) <= set(found["strengths"]) and len(both) == 2 for both in entry["strengths"].values())
        assert entry["cost"]["samples"] == 300
        # Of sgd's deltas the store keeps two vectors.
        assert entry["cost"]["collect_bytes"] > 300 * 4 * (3 * 24 if entry["settings"]["optimizer"] == "adam" else 3 + 6)
        assert entry["cost"]["collect_seconds"] > 0
    ocd(without, "select-layer", "--quiet")
    ocd(without, "collect", "--quiet")
    manifest = without.manifest("collect")
    stored = sum(entry["size"] for name, entry in manifest["files"].items() if name.startswith("deltas.zarr"))
    assert stored < 1.2 * mine["cost"]["collect_bytes"]


def test_with_nothing_to_recommend_the_settings_stay(ocd, without):
    before = without.config.read_bytes()
    shown = ocd(without, "probe", "--quick", "--write", "--layer", "2.weight", "--samples", 20).stdout
    assert shown.endswith(f"nothing to recommend: {without.config} stays as it is\n")
    assert without.config.read_bytes() == before


def test_named_layers_alone(ocd, without):
    found = ocd.json(without, "probe", "--quick", "--layer", "0.weight", "--samples", 20)
    assert {entry["layer"] for entry in found["tried"]} == {"0.weight"}
    assert found["samples"] == 20


def test_layers_of_every_kind_and_inputs_without_a_distance(ocd, project):
    folder = project({"task": {"model": "mymodel:Reader"}}, code="models")
    draw = np.random.default_rng(0)
    for name in ("train", "test"):
        folder.save(f"{name}.npz", draw.integers(0, 20, (120, 7)), draw.integers(0, 3, 120))
    ocd(folder, "train-base", "--quiet")
    found = ocd.json(folder, "probe", "--quick", "--samples", 12)
    assert {entry["layer"] for entry in found["tried"]} >= {"words.weight", "body.weight_ih_l0", "head.weight"}
    for entry in found["tried"]:
        names = {row["name"] for row in entry["rows"]}
        assert {"nearest neighbour in layer input", "nearest k blended in layer input"} <= names
        assert not {"nearest neighbour", "nearest k blended"} & names


def test_its_own_settings_come_first(ocd, without):
    found = ocd.json(without, "probe", "--quick", "--layer", "2.weight", "--samples", 8, "--set", "collect.steps=1")
    assert [entry["settings"]["steps"] for entry in found["tried"]] == [1, 3, 3, 3, 3]
    assert set(tables()["collect"].model_fields) >= set(found["tried"][0]["settings"])
    assert toml(found["tried"][0]["settings"]["lr"]) == "0.005"


def test_a_dry_run_tries_nothing(ocd, without):
    shown = ocd(without, "probe", "--dry-run", "--layer", "2.weight")
    assert shown.stdout.startswith(
        "probe: try adam 0.005 × 3, adam 0.0005 × 3, sgd 0.005 × 3, adam 0.002 × 3, sgd 0.05 × 3 on 2.weight"
    )


def test_what_it_suggests_is_accepted_whatever_stood_there(ocd, without):
    momentum = ("--set", "collect.optimizer=sgd", "--set", "collect.momentum=0.9")
    found = ocd.json(without, "probe", "--quick", "--layer", "2.weight", "--samples", 8, *momentum)
    assert "momentum" not in found["tried"][0]["settings"]
    assert all(entry["settings"]["momentum"] == 0 for entry in found["tried"][1:])


def test_a_small_run_gains_where_x_tells_the_error(ocd, with_headroom, monkeypatch):
    """It uses the run's own stages in a folder of its own, and recommends the objective that gained."""
    monkeypatch.setattr(small_run, "LONGEST_S", math.inf)
    before = with_headroom.files()
    found = ocd.json(with_headroom, "probe", "--layer", "0.weight")
    assert with_headroom.files() == before
    small = found["small_run"]
    assert (small["samples"], small["start"]["select-layer.layer"]) == (400, "0.weight")
    for way in small["ways"].values():
        assert way["gains"]
        assert way["mean"] < 0.5 * small["base"]
        assert way["difference"] == pytest.approx(way["mean"] - small["base"])
    # As the way was trained whose gain is the surest.
    start, ways = found["start_with"], small["ways"]
    surest = min(ways, key=lambda name: ways[name]["interval"][1])
    assert start["train-diffusion.objective"] == "task"
    assert (start.get("train-diffusion.neighbours") == 0) == (surest == "without neighbours")
    assert start["train-diffusion.conditioning_noise"] == 0.3
    assert " --set train-diffusion.objective=task" in found["next"]
    assert load_project(with_headroom.config, values=start).settings.train_diffusion.tune_after == "auto"


def test_a_small_run_that_does_not_gain_recommends_nothing(ocd, without, monkeypatch):
    """Labels independent of x."""
    monkeypatch.setattr(small_run, "LONGEST_S", math.inf)
    found = ocd.json(without, "probe", "--layer", "2.weight")
    assert not any(way["gains"] for way in found["small_run"]["ways"].values())
    assert (found["start_with"], found["next"]) == ({}, "")


def test_a_small_run_that_would_be_no_finding_is_not_made(ocd, make_run):
    found = ocd.json(make_run(HELPING, "planted", "train-base"), "probe", "--layer", "0.weight", "--samples", 30)
    assert found["verdict"].startswith("mend the base first")
    assert found["small_run"] is None


def test_a_small_run_that_takes_long_is_left_out(ocd, with_headroom, monkeypatch):
    monkeypatch.setattr(small_run, "LONGEST_S", 1e-6)
    found = ocd.json(with_headroom, "probe", "--layer", "0.weight", "--samples", 20)
    assert found["small_run"] is None
    (entry,) = (one for one in found["left_out"] if one["name"] == "a small run")
    assert entry["reason"].startswith("it would take about ")
