"""Bad input that collect finds: layers, conditioning, forms of the store, and tasks that do not go with them."""

import numpy as np
from bad_input import Bad
from folders import arrays, own_task

# What the factored store takes.
FACTORED = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "store": "factored", "block_samples": 8}
NO_FACTORS = (
    "error: collect.store = 'factored' needs deltas that are one outer product: {}\n  use --set collect.store=dense{}\n"
)
LINEAR = ", or --set collect.optimizer=sgd without weight_decay"


def after_selection(id, says, model, layer, collect=None, task=None, words="collect", **named):
    """Of a project of tests/projects/models whose layer has been chosen."""
    settings = {
        "task": {"model": f"mymodel:{model}", **(task or {})},
        "select-layer": {"layer": layer, "draws": 0},
        "collect": collect or {},
    }
    return Bad(id, words, says, settings=settings, project="models", after="run --until select-layer", **named)


def of_watched(id, says, layer="fc", after="run --until select-layer", words="collect", **args):
    settings = {
        "task": own_task("mytask:Watching", layer=layer, **args),
        "select-layer": {"layer": f"{layer}.weight", "draws": 0},
    }
    return Bad(id, words, says, settings=settings, project="watched", after=after)


def with_channels(folder, _):
    for name, (rows, seed) in {"train.npz": (40, 0), "test.npz": (24, 1)}.items():
        x, y = arrays(rows, seed)
        folder.save(name, x[:, None], y)


def with_words(folder, _):
    for name in ("train.npz", "test.npz"):
        folder.save(name, np.random.default_rng(0).integers(0, 9, (40, 3)), np.arange(40) % 3)


def not_factored(id, why, hint, model="net", layer="2.weight", changed=None, change=None):
    return after_selection(
        f"deltas that are no outer product: {id}",
        NO_FACTORS.format(why, hint),
        model,
        layer,
        FACTORED | (changed or {}),
        change=change,
        then=["collect --set collect.store=dense --set collect.optimizer=sgd"],
    )


ROWS = [
    after_selection("a layer that does not count", ["the loss does not depend on the layer"], "Unused", "unused.weight"),
    after_selection("a layer that is not called", ["is not called", "layer"], "Unused", "uncalled.weight"),
    after_selection(
        "a layer without the sample on its first axis",
        ["layer_input of inner.weight is not one row per sample"],
        "ByColumns",
        "inner.weight",
    ),
    after_selection(
        "conditioning on integers",
        ["collect.condition_on_x = true: x holds integers"],
        "words",
        "2.weight",
        {"condition_on_x": True},
        change=with_words,
    ),
    not_factored("adam", "Adam's steps are none", LINEAR, changed={"optimizer": "adam", "momentum": 0}),
    not_factored("weight decay", "with weight decay they are none", LINEAR, changed={"weight_decay": 0.1}),
    not_factored("a convolution", "the layer is a Conv1d, not a Linear", "", "convolution", "0.weight", change=with_channels),
    not_factored("several vectors", "the layer sees 2 vectors per sample, not one", "", "TwoVectors", "each.weight"),
    Bad(
        "repeats without parts to draw",
        "collect",
        "error: collect.repeats = 3: the task has no view(), so every overfit of a sample is the same\n"
        "  leave it out, or draw a part of the sample for each gradient step in view()\n",
        settings={
            "task": own_task("mytask:WithoutView"),
            "select-layer": {"layer": "0.weight", "draws": 0},
            "collect": {"repeats": 3},
        },
        project="points",
        after="run --until select-layer",
    ),
    *(
        of_watched(
            f"watched: {says.partition(':')[2].strip()}",
            f"error: {says}\n  it has early, early.wide, early.gate, fc, head, never\n",
            after="",
            words="train-base",
            watched=names,
        )
        for names, says in (
            (["early.gates"], "watched = 'early.gates': the model has no module of that name"),
            (["early.gate"] * 2, "watched = 'early.gate': the model would have two fields called early_gate"),
        )
    ),
    of_watched(
        "watched: a module that is not called",
        "error: the watched module never gives no tensor in the forward pass\n  mend `watched` of the task\n",
        watched=["never"],
    ),
    of_watched(
        "watched: a field that the store has itself",
        ["error: the conditioning has a field named 'rho', which the store uses itself\n"],
        "rho",
        watched=["rho"],
    ),
]
