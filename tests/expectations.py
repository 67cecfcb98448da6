"""What `ocd status` must say: the states of all stages, and what changed."""

STAGES = ("train-base", "select-layer", "collect", "train-diffusion", "train-scale", "infer")
FOLDERS = {stage: "infer/test" if stage == "infer" else stage for stage in STAGES}
ALL_DONE = dict.fromkeys(STAGES, "done")


def from_on(first, state):
    """The states where `first` has one, and what reads it is stale."""
    reads = ("infer",) if first in ("train-diffusion", "train-scale") else STAGES[STAGES.index(first) + 1 :]
    return {name: state if name == first else "stale" if name in reads else "done" for name in STAGES}


def changes(entry):
    return {change["setting"]: (change["was"], change["now"]) for change in entry["changed"]}
