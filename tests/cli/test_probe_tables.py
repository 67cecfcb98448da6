"""The probe's tables at every width: names are broken where there is no room, numbers never."""

import io

import pytest
from rich.console import Console

from ocd_cli.probe_tables import show_probe
from stages.foundation.numbers import figure, signed

NAMES = (
    "base",
    "overfitted on test",
    "nearest neighbour",
    "nearest k blended in layer input",
    "random direction",
    "mean delta",
)
LONG = "encoder.layers.11.attention.self.query_key_value_packed_.weight"


def row(name, mean, base):
    difference = None if mean is None else mean - base
    interval = None if mean is None else [difference - abs(mean), difference + abs(mean)]
    return {"name": name, "metrics": {"loss": {"mean": mean, "difference": difference, "interval": interval}}}


CHOICE = {
    "layer": "fc1.weight",
    "settings": {"optimizer": "sgd", "lr": 0.005, "steps": 3},
    "row": "nearest k blended",
    "strength": 2.0,
}
OTHER = {**CHOICE, "layer": "fc2.weight", "row": "overfitted on test", "strength": 1.0}


def trial(layer="fc1.weight", losses=(0.1666, 0.001234, 0.06491, 0.25, 0.17, 0.1662), strengths=(0.5, 8.0), lr=5e-4):
    return {
        "layer": layer,
        "settings": {"optimizer": "adam", "lr": lr, "steps": 3},
        "rows": [row(name, loss, losses[0]) for name, loss in zip(NAMES, losses, strict=True)],
        "strengths": {name: list(strengths) for name in NAMES[2:]},
        "cost": {"collect_seconds": 3.0, "collect_bytes": 10**6, "train_diffusion_seconds": None},
    }


def shown(*trials, width=80, **values):
    """The text, and its lines without what is around them."""
    found = {
        "metric": "loss",
        "samples": 120,
        "searched": 1000,
        "strengths": [0.0, 0.5, 8.0],
        "tried": list(trials),
        "left_out": [],
        "warnings": [],
        "chosen": {"neighbours": {"favoured": [CHOICE, CHOICE]}, "labels": {"favoured": [CHOICE, OTHER]}},
        "verdict": "no headroom",
        "small_run": None,
        "start_with": {},
        "written": None,
        "unchanged": None,
        "next": "",
    } | values
    out = io.StringIO()
    show_probe(Console(width=width, file=out, markup=False, highlight=False), found)
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 100, 180])
@pytest.mark.parametrize("layer", ["fc1.weight", LONG])
@pytest.mark.parametrize(
    "losses",
    [
        (0.1666, 0.001234, 0.06491, 0.25, 0.17, 0.1662),
        (2.8096e19, 2.71e19, 2.8e19, 3.1234e19, 3e19, 2.8096e19),
        (1e-9, 1.234e-12, 9.9e-10, 1.1e-9, 1e-9, 1e-9),
        (-123456.0, -234567.0, -134567.0, -123450.0, -1.0, -123457.0),
    ],
)
def test_every_number_is_there_whole(width, layer, losses):
    text = shown(trial(layer, losses), trial(layer, losses, lr=1e-5), width=width)
    words = text.replace("[", " ").replace("]", " ").replace(", ", " ").split()
    base, labels, best, _, _, mean = losses
    expected = [
        *map(figure, (base, labels, best, mean)),
        *map(signed, (best - base, best - base - abs(best), best - base + abs(best))),
    ]
    for number in expected:
        assert number in words
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    # A layer's name has a row of its own, and is broken where it has to be.
    assert layer in "".join(text.split())


def test_two_tables_at_80_columns():
    lines = shown(trial(), trial(lr=0.002, strengths=(2.0, 2.0)), trial("fc2.weight")).splitlines()
    assert lines[0] == "base: loss 0.1666 on 120 held-out samples; neighbours are looked for among 1,000"
    rows = [line.rstrip() for line in lines]
    assert " adam 0.0005 × 3  0.001234  0.1662     0.06491  nearest neighbour × 0.5, 8*" in rows
    assert " adam 0.002 × 3   0.001234  0.1662     0.06491  nearest neighbour × 2" in rows
    assert rows.count(" fc1.weight") == 1
    assert " fc1.weight           3 s  976.6 KiB  too large" in rows


def test_what_is_not_finite_is_named():
    text = shown(trial(losses=(0.1666, None, None, 0.25, None, None)))
    assert text.count("not finite") == 2
    assert "nearest k blended in layer input" in " ".join(text.split())


def test_what_to_paste_is_one_line():
    flags = (
        "ocd run --set select-layer.layer=fc1.weight --set collect.optimizer=sgd --set collect.lr=0.005 --set collect.steps=3"
    )
    start = {"select-layer.layer": "fc1.weight", "collect.lr": 0.005}
    lines = shown(trial(), start_with=start, next=flags, warnings=["seen"]).splitlines()
    assert lines[-3:] == [
        "no headroom",
        "next: ocd probe --write, or give every command that follows these flags:",
        flags,
    ]
    assert "neighbours: both halves choose fc1.weight, sgd 0.005 × 3, nearest k blended × 2" in lines
    assert "the other fc2.weight, sgd 0.005 × 3" in " ".join(" ".join(lines).split())
    lines = shown(trial(), start_with=start, next="ocd run", written="/here/ocd.toml").splitlines()
    assert lines[-2:] == ["written into /here/ocd.toml: select-layer.layer = fc1.weight, collect.lr = 0.005", "next: ocd run"]


def test_a_small_run_is_one_sentence():
    ways = {
        "without neighbours": {"mean": 0.15, "difference": -0.0166, "interval": [-0.03, 0.002], "gains": False},
        "with neighbours": {"mean": 0.11, "difference": -0.0566, "interval": [-0.08, -0.04], "gains": True},
    }
    small = {"samples": 600, "steps": 300, "base": 0.1666, "ways": ways, "start": {"select-layer.layer": "fc1.weight"}}
    assert (
        "a small run with fc1.weight, 600 samples and 300 steps: the task's loss goes from 0.1666 to 0.15 without neighbours "
        "(-0.0166, 99 % interval [-0.03, +0.002]), and to 0.11 with neighbours (-0.0566, 99 % interval [-0.08, -0.04])"
    ) in " ".join(shown(trial(), small_run=small).split())


def test_a_half_that_favours_nothing_names_no_layer():
    nothing = {"favoured": [CHOICE | {"strength": 0.0}, CHOICE]}
    text = " ".join(shown(trial(), chosen={"neighbours": nothing, "labels": {"favoured": [CHOICE, OTHER]}}).split())
    assert "neighbours: one half chooses no delta, for none is sure to gain; the other fc1.weight, sgd 0.005 × 3" in text
