"""Bad input in the user's code: models, losses, datasets, tasks, and weights that are imported."""

import os

import torch
from bad_input import Bad, at, edited, written
from folders import PROJECTS, own_task
from safetensors.torch import load_file

# What a project of tests/projects/bad asks for; what the message says.
CODE = {
    "no such module": ({"model": "nowhere_to_be_found:net"}, ["nowhere_to_be_found", "task.model"]),
    "no such name": ({"model": "mymodel:nett"}, ["mymodel.py has no nett", "did you mean net?"]),
    "raises in the model": (
        {"model": "mymodel:unbuildable"},
        [
            "mymodel:unbuildable",
            "KeyError",
            "no such part",
            at("return helper()", "unbuildable"),
            at("raise KeyError", "helper"),
        ],
    ),
    "wrong argument": ({"model_args": {"widht": 3}}, ["mymodel:net", "TypeError", "widht"]),
    "no module returned": ({"model": "mymodel:a_number"}, ["model() returned int", "torch.nn.Module", "task.model"]),
    "raises in the forward pass": (
        {"model": "mymodel:Raising"},
        ["forward pass", "ValueError", "cannot", at("raise ValueError", "forward")],
    ),
    "another width than the data": ({"model": "mymodel:too_wide"}, ["forward pass", "RuntimeError"]),
    "mixing: batch statistics": ({"model": "mymodel:batch_statistics"}, ["mixes samples in eval mode", "running statistics"]),
    "mixing: a mean over the batch": ({"model": "mymodel:Centred"}, ["mixes samples in eval mode", "running statistics"]),
    "unknown loss": ({"loss": "cross_entorpy"}, ["task.loss", "'cross_entorpy'", "cross_entropy", "mse"]),
    "unknown loss function": ({"loss": "mymodel:los"}, ["has no los", "did you mean loss?"]),
    "loss: one value for all": ({"loss": "mymodel:one_value"}, ["()", "batch of", "one value per sample", 'reduction="none"']),
    "loss: a column": ({"loss": "mymodel:a_column"}, ["1)", "one value per sample"]),
    "loss: no tensor": ({"loss": "mymodel:no_tensor"}, ["float", "one value per sample"]),
    "loss: raises": ({"loss": "mymodel:raising"}, ["the loss raised AttributeError", at("output.nothing", "raising")]),
    "loss: detached": ({"loss": "mymodel:detached"}, ["loss does not depend on"]),
    "loss: constant": ({"loss": "mymodel:constant"}, ["loss does not depend on"]),
    "dataset: raises at one row": (
        {"train": "mymodel:RaisingRow"},
        ["train[5] raised OSError", "row is unreadable", at("row is unreadable", "__getitem__")],
    ),
    "dataset: no length": ({"train": "mymodel:no_length"}, ["train has no length", "__len__"]),
    "dataset: empty": ({"train": "mymodel:empty"}, ["train is empty"]),
    "dataset: one sample": ({"train": "mymodel:one_sample"}, ["1 sample", "task.validation"]),
    "dataset: no pairs": ({"train": "mymodel:no_pairs"}, ["train[0] is Tensor", "pair (x, y)"]),
    "dataset: ragged": ({"train": "mymodel:ragged"}, ["train: rows", "do not stack", "same shape"]),
    "dataset: raises": ({"train": "mymodel:unreachable"}, ["mymodel:unreachable raised OSError", "server away"]),
    "dataset: label out of range": ({"train": "mymodel:label_too_large"}, ["label 3 is out of range", "[2]"]),
}
# Put before or after the plain model's code, which then does not import.
NOT_IMPORTED = {
    "does not import": ("import not_installed_anywhere\n", "", ["mymodel.py", "not_installed_anywhere", "line 1"]),
    "not Python": ("", "def = 3\n", ["mymodel.py is not valid Python", "line 8: invalid syntax"]),
    "a bracket never closed": ("", "broken = (3\n", ["mymodel.py", "line 8"]),
    "raises on import": ("1 / 0\n", "", ["mymodel.py, line 1", "1 / 0", "ZeroDivisionError", "run the same command again"]),
    "leaves on import": ("raise SystemExit(7)\n", "", ["mymodel.py, line 1", "SystemExit"]),
}


def around(before, after):
    """The plain model's code between these texts."""
    code = (PROJECTS / "plain" / "mymodel.py").read_text()
    return lambda folder, _: (folder.root / "mymodel.py").write_text(before + code + after)


# Weights to import


def given(change):
    """The weights that a finished run has, changed, as weights.pt."""

    def write(folder, _):
        state = load_file(folder.run / "train-base" / "base.safetensors")
        change(folder.root / "weights.pt", state)

    return write


def spoiled(**changes):
    """A state dict with other entries, or without those that are None."""

    def write(path, state):
        torch.save({name: value for name, value in (state | changes).items() if value is not None}, path)

    return given(write)


class Evil:
    """Runs a command when unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def evil(folder, patch):
    spoiled(evil=Evil(f"touch {folder.root / 'ran'}"))(folder, patch)


def nothing_ran(folder, _):
    assert not (folder.root / "ran").exists()


WEIGHTS = {
    "missing": (None, ["weights.pt is missing"]),
    "a text": (written("weights.pt", "hello"), ["weights.pt cannot be read", "safetensors"]),
    "a whole model": (given(lambda path, _: torch.save(torch.nn.Linear(4, 3), path)), ["cannot be read", "state_dict()"]),
    "a list": (given(lambda path, _: torch.save([1, 2], path)), ["list", "state dict"]),
    "a key too few": (spoiled(**{"2.bias": None}), ["missing: 2.bias (3,)"]),
    "another shape": (spoiled(**{"0.weight": torch.ones(7, 4)}), ["0.weight: the file has (7, 4), the model (6, 4)"]),
    "everything at once": (
        given(lambda path, _: torch.save({"weight": torch.ones(3)}, path)),
        ["missing: 0.weight", "missing: 2.bias", "unexpected: weight", "task.model"],
    ),
}
IMPORT = "train-base --force --weights {root}/weights.pt"


def of_task(id, name, says, project="tasks", **named):
    return Bad(id, "train-base", says, settings={"task": own_task(name)}, project=project, **named)


def imported(name, change, says, code=2, **named):
    return Bad(f"weights: {name}", IMPORT, ["weights", *says], code, finished=True, change=change, **named)


ROWS = [
    *(Bad(name, "train-base", says, settings={"task": task}, project="bad") for name, (task, says) in CODE.items()),
    Bad("loss: not a number", "train-base", ["train[", "nan"], 1, {"task": {"loss": "mymodel:not_a_number"}}, "bad"),
    *(
        Bad(name, "train-base", says, change=around(before, after), then=["train-base"], mend=around("", ""))
        for name, (before, after, says) in NOT_IMPORTED.items()
    ),
    *(
        of_task(f"a task without {name}", f"task:Lacking{name.title()}", [f"task:Lacking{name.title()}", f"lacks {name}"])
        for name in ("model", "train", "test", "loss")
    ),
    of_task("a task that is none", "task:NotATask", ["task:NotATask", "stages.tasks.protocol.Task"]),
    of_task("a metric of one number", "mytask:OneNumber", ["metrics() gave mean as () for a batch of"], "forms", begins=True),
    *(imported(name, change, says) for name, (change, says) in WEIGHTS.items()),
    imported("not a number", spoiled(**{"0.weight": torch.full((6, 4), float("nan"))}), ["train[", "nan"], 1),
    # torch's own message explains how to run the code after all.
    imported(
        "code inside",
        evil,
        ["weights.pt", "safetensors"],
        mend=nothing_ran,
        hides=["weights_only=False", "can still be loaded"],
    ),
    Bad(
        "weights: damaged safetensors",
        "train-base",
        ["weights.safetensors", "damaged"],
        settings={"task": {"weights": "weights.safetensors"}},
        change=lambda folder, _: (folder.root / "weights.safetensors").write_bytes(b"\x10" * 50),
    ),
    Bad(
        "code changed between stages",
        "collect --force",
        ["train-base is stale", "mymodel.py", "ocd train-base --force"],
        3,
        finished=True,
        change=edited("mymodel.py", "Tanh", "ReLU"),
    ),
]
