"""The verdict's word on tasks where it is known beforehand, over many seeds: it has to be right in 95 of 100."""

import collections
import json

import pytest
from folders import own_task

SEEDS, RIGHT = 100, 95
FAST = {
    "train-base": {"epochs": 12, "lr": 0.03, "batch_size": 40, "patience": 0},
    "select-layer": {"layer": "0.weight", "draws": 0},
    "collect": {"optimizer": "sgd", "lr": 0.03, "steps": 3},
    "train-diffusion": {"width": 64, "blocks": 1, "batch_size": 64, "max_steps": 200, "evaluate_steps": 200, "lr": 2e-3},
    "train-scale": {"width": 32, "batch_size": 64, "max_steps": 150, "evaluate_steps": 150},
    "infer": {"ensemble": 5, "sample_steps": 5},
    "evaluate": {"resamples": 500, "memorisation_samples": 10, "longer_base": True},
}
# What the error holds that x tells, and what chance; and what has to be said of it.
PLANTED = {
    "helps": ({}, {"known": 1.0, "noise": 0.1}, "helps"),
    "does not help": ({"collect": {"lr": 0.002}}, {"known": 0.0, "noise": 1.0}, "does not help"),
    "harms": ({"collect": {"lr": 0.3}, "infer": {"strength": 2.0}}, {"known": 0.0, "noise": 1.0}, "harms"),
    "undecided for want of samples": ({"collect": {"lr": 0.1}}, {"known": 0.25, "noise": 1.0, "test": 16}, "undecided"),
    "helps, but a longer base does more": (
        {
            "train-base": {"epochs": 8, "lr": 0.01},
            "select-layer": {"layer": "2.weight"},
            # So short a training keeps part of what OCD could gain: clearly less than the longer base does.
            "train-diffusion": {"max_steps": 120, "evaluate_steps": 120},
        },
        {"known": 1.0, "noise": 0.1, "hidden": 32, "test": 400},
        "does not help",
    ),
}


def outcome(ocd, make_run, seed, settings, args):
    """The results of a whole run with data and draws of its own."""
    tables = {name: {**FAST.get(name, {}), **settings.get(name, {})} for name in FAST}
    folder = make_run(
        {"run": {"seed": seed}, "task": own_task("mytask:Seeded", seed=seed, **args), **tables}, "planted", "train-scale"
    )
    return ocd.json(folder, "evaluate")


@pytest.mark.slow  # a hundred runs of some seconds each
@pytest.mark.parametrize("name", PLANTED)
def test_the_verdict_has_the_right_word(ocd, make_run, name, capsys):
    settings, args, right = PLANTED[name]
    found = collections.Counter(outcome(ocd, make_run, seed, settings, args)["outcome"] for seed in range(SEEDS))
    with capsys.disabled():
        print(f"\n{name}: {json.dumps(dict(found.most_common()))}")
    assert found[right] >= RIGHT * SEEDS // 100
