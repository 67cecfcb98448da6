"""What `ocd status` must say: the states of all stages, and what changed."""

STAGES = ("train-base", "select-layer", "collect", "train-diffusion", "train-scale", "infer")
FOLDERS = {stage: "infer/test" if stage == "infer" else stage for stage in STAGES}
ALL_DONE = dict.fromkeys(STAGES, "done")


def from_on(first, state, rest="done"):
    """The states where `first` has one, and what reads it is stale."""
    reads = {
        "train-base": STAGES[1:],
        "select-layer": ("collect", "train-diffusion", "train-scale", "infer"),
        "collect": ("train-diffusion", "train-scale", "infer"),
        "train-diffusion": ("infer",),
        "train-scale": ("infer",),
        "infer": (),
    }[first]
    return {name: state if name == first else "stale" if name in reads else rest for name in STAGES}


def changes(entry):
    return {change["setting"]: (change["was"], change["now"]) for change in entry["changed"]}
