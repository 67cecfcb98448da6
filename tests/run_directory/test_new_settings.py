"""A setting that a later version adds leaves what is there as it is, at its default; otherwise it counts like any other."""

from folders import states
from older import forget


def test_results_from_before_a_setting_stay(ocd, finished):
    forget(finished, "collect", "collect.condition_on_x")
    assert set(states(ocd, finished).values()) == {"done"}
    assert "up to date" in ocd(finished, "collect").stdout


def test_such_a_setting_counts_where_it_is_not_at_its_default(ocd, finished):
    forget(finished, "collect", "collect.condition_on_x")
    found = states(ocd, finished, "collect.condition_on_x=true")
    assert {name for name, state in found.items() if state == "stale"} >= {"collect", "train-diffusion", "infer"}
    shown = ocd(finished, "collect", "--set", "collect.condition_on_x=true", code=3)
    assert "collect.condition_on_x was not there, is now True" in shown.stderr
