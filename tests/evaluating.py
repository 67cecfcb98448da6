"""What the tests of evaluate share."""

COSTLY = ["alternative layer", "deterministic hypernetwork", "ocd conditioned on x", "base trained for as long again"]


def evaluated(ocd, folder, *args):
    """The results of `ocd evaluate`, which must be those of the file."""
    found = ocd.json(folder, "evaluate", *args)
    same = found == folder.read("evaluate/results.json")
    assert same  # on its own: pytest would take minutes to explain a difference
    return found


def rows_of(results):
    return {row["name"]: row for row in results["rows"]}
