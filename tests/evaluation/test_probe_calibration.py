"""probe on planted tasks drawn anew twenty times: it seldom sees headroom for x where there is none, and seldom misses it."""

from collections import Counter

import pytest
from folders import make_folder
from planted import HELPING, HOPELESS

SEEDS = range(20)


@pytest.mark.slow  # forty bases, and ten to twenty trials on each
@pytest.mark.parametrize(("task", "fewest", "most"), [(HOPELESS, 0, 1), (HELPING, 18, 20)], ids=["hopeless", "helping"])
def test_how_often_it_says_headroom_for_x(task, fewest, most, ocd, tmp_path):
    found = []
    for seed in SEEDS:
        settings = task | {"run": {"seed": seed}, "task": task["task"] | {"args": {"draw": seed}}}
        folder = make_folder(tmp_path / str(seed), settings, "planted")
        ocd(folder, "train-base", "--quiet")
        found.append(ocd.json(folder, "probe", "--quick"))
        neighbours = found[-1]["chosen"]["neighbours"]
        low, high = neighbours["interval"]
        print(f"{seed:2} {found[-1]['headroom']:8} {neighbours['difference']:+.4f} [{low:+.4f}, {high:+.4f}]")
    counts = Counter(one["headroom"] for one in found)
    print(counts)
    assert fewest <= counts["x"] <= most
