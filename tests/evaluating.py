"""What the tests of evaluate share."""

# Of a classification, in order; and those that are added on request.
ROWS = [
    "base",
    "overfitted on test",
    "overfitted on test, all layers",
    "nearest neighbour",
    "no scaling",
    "ocd one draw",
    "ocd ensemble",
    "ocd validated strength",
    "mean network",
    "temperature-scaled base",
    "random direction",
    "random training deltas",
    "mean delta",
    "mean delta of class",
    "nearest neighbour in layer input",
    "nearest k blended",
    "nearest k blended in layer input",
    "shuffled conditioning",
    "nearest neighbours' labels",
]
COSTLY = [
    "alternative layer",
    "deterministic hypernetwork",
    "ocd conditioned on x",
    "ocd by the paper's objective",
    "plain network on I(x)",
    "base trained for as long again",
    "deep ensemble",
]


def evaluated(ocd, folder, *args):
    """The results of `ocd evaluate`, which must be those of the file."""
    found = ocd.json(folder, "evaluate", *args)
    same = found == folder.read("evaluate/results.json")
    assert same  # on its own: pytest would take minutes to explain a difference
    return found


def rows_of(results):
    return {row["name"]: row for row in results["rows"]}
