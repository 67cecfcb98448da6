"""What people have reported of their models, losses and data, and what becomes of each.

`python tests/reported.py` prints the table of docs/your-model.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from folders import Folder


def numbers(folder: Folder) -> None:
    """Labels that are numbers, for regression."""
    for name, seed in (("train.npz", 0), ("test.npz", 1)):
        x = np.random.default_rng(seed).normal(size=(40, 4)).astype("float32")
        folder.save(name, x, (x[:, 0] - x[:, 1] ** 2).astype("float32"))


def padded(folder: Folder) -> None:
    """Inputs whose last numbers are zero, from some place on; all of the first ten have one length."""
    for name, seed in (("train.npz", 0), ("test.npz", 1)):
        draw = np.random.default_rng(seed)
        lengths = np.where(np.arange(60) < 50, 4, draw.integers(1, 4, 60))
        x = draw.normal(size=(60, 4)).astype("float32") * (np.arange(4) < lengths[:, None])
        folder.save(name, x.astype("float32"), np.arange(60) % 3)


def codes(folder: Folder) -> None:
    """Inputs that are numbers of words."""
    for name, seed in (("train.npz", 0), ("test.npz", 1)):
        x = np.random.default_rng(seed).integers(1, 12, size=(40, 5))
        folder.save(name, x, (x[:, 0] > 6).astype(int))


def pictures(folder: Folder) -> None:
    """Inputs (2, 6, 6)."""
    for name, seed in (("train.npz", 0), ("test.npz", 1)):
        x = np.random.default_rng(seed).normal(size=(40, 2, 6, 6)).astype("float32")
        folder.save(name, x, (x[:, 0, 2, 2] > 0).astype(int))


def beside_stages(folder: Folder) -> None:
    """A file with the name of our library."""
    (folder.root / "stages.py").write_text("width = 8\n")


@dataclass(frozen=True)
class Report:
    """One report.

    Attributes:
        what: in words, for the documentation.
        task: settings of `[task]` beside the usual ones.
        says: what the one message must hold; empty: it works, with deltas that equal the plain loop's.
        layer: the layer to overfit.
        data: what is done to the data.
        collect: settings of `[collect]`.
        until: the stage that it must come to, or is refused in.
    """

    what: str
    task: dict[str, Any]
    says: Sequence[str] = ()
    layer: str = "fc.weight"
    data: Callable[[Folder], object] | None = None
    collect: dict[str, Any] | None = None
    until: str = "collect"


ACROSS, MIXES = "the loss looks across the batch", "the model mixes samples in eval mode"


def model(name: str) -> dict[str, Any]:
    return {"model": f"mymodel:{name}"}


def loss(name: str, net: str = "Net") -> dict[str, Any]:
    return {"model": f"mymodel:{net}", "loss": f"losses:{name}"}


LOSSES = {
    "regression_broadcast": Report(
        "output `(B, 1)` beside labels `(B,)`",
        loss("broadcast", "One"),
        [ACROSS, "(4, 1)", "(4, 4)", "squeeze(-1)"],
        data=numbers,
    ),
    "regression": Report("both of one shape, `(B,)`", loss("squared", "Flat"), data=numbers),
    "batch_standardised_target": Report(
        "targets standardised by the batch", loss("standardised", "Flat"), [ACROSS, "alone", "in a batch of 4"], data=numbers
    ),
    "batch_weighted_sgd": Report(
        "class weights divided by the batch's sum", loss("weighted"), [ACROSS], collect={"optimizer": "sgd"}
    ),
    "hardest": Report("mining of the hardest samples", loss("hardest"), [ACROSS]),
    "cox_loss": Report("Cox's partial likelihood", loss("cox", "Flat"), [ACROSS], data=numbers),
    "inbatch_contrastive": Report("a contrastive loss inside the batch", loss("contrastive", "Normalised"), [ACROSS]),
    "one_value": Report("one value for the whole batch", loss("one_value"), ["the loss returned () for a batch of 4"]),
    "loss_class": Report(
        "a class such as `torch.nn.CrossEntropyLoss`, not an instance",
        model("Net") | {"loss": "torch.nn:CrossEntropyLoss"},
        ["is a class, expected a function", 'reduction="none"'],
    ),
    "a pinball loss of several quantiles": Report("quantiles", loss("pinball"), data=numbers),
    "quantiles_scored": Report(
        'quantiles with `kind = "regression"`',
        loss("pinball") | {"kind": "regression"},
        ["kind = 'regression' scores by mse and mae, which do not fit", "leave kind out"],
        data=numbers,
    ),
    "dict_output_builtin_loss": Report(
        "a dict beside a built-in loss",
        model("AsDict"),
        ["task.loss = 'cross_entropy' needs one tensor", "dict of logits", "output['logits']"],
    ),
}
OUTPUTS = {
    "dict": Report("a dict, and a loss that takes an entry", loss("own_logits", "AsDict")),
    "namedtuple": Report("a namedtuple", loss("attributes_alone", "AsPair")),
    "dataclass": Report("a dataclass with entries that are None", loss("attributes_alone", "AsDataclass"), until="infer"),
    "hf_modeloutput": Report("a dict with attributes, as ModelOutput", loss("attributes_alone", "AsOutput"), until="infer"),
    "out_int_argmax": Report("integers beside numbers", loss("own_logits", "WithClasses"), until="infer"),
    "integers_alone": Report(
        "integers alone", loss("squared", "ClassesAlone"), ["the model returns integers alone", "before rounding"]
    ),
    "squeeze_regression": Report(
        "`squeeze()`, which drops the sample's axis",
        loss("squared", "Squeezed"),
        ["the model returned a tensor of shape () for 1 sample", "squeeze(-1)"],
        data=numbers,
    ),
    "aux_in_train_mode": Report(
        "a tuple in train mode alone",
        model("WithAuxiliary"),
        ["the model returns a tuple of 0 (4, 3), 1 (4, 3) in train mode", "--weights"],
    ),
}
MODELS = {
    "bf16_model": Report("bfloat16", model("BFloat"), until="infer"),
    "bf16_conv": Report("bfloat16 convolutions", model("BFloatPictures"), data=pictures),
    "double_model": Report("float64", model("Double"), until="infer"),
    "checkpointing": Report("activation checkpointing", model("Checkpointed"), layer="mid.weight"),
    "checkpointing_reentrant": Report("reentrant checkpointing", model("CheckpointedReentrant"), layer="mid.weight"),
    "compiled_model": Report("torch.compile", model("compiled"), layer="_orig_mod.fc.weight"),
    "compiled_in_place": Report("Module.compile()", model("compiled_in_place")),
    "extra_state": Report("extra state that is JSON", model("ExtraState")),
    "object_state": Report(
        "extra state that is another object", model("ObjectState"), ["the model's state dict has _extra_state, a dict", "JSON"]
    ),
    "sparse_buffer": Report("a sparse buffer", model("SparseBuffer")),
    "lazy": Report("lazy modules", model("Lazy")),
    "max_norm_embedding": Report("an embedding with `max_norm`", model("MaxNorm"), layer="emb.weight", data=codes),
    "sparse_gradients": Report("an embedding with sparse gradients", model("SparseGradients"), layer="emb.weight", data=codes),
    "quiet_train": Report("a `train()` that returns nothing", model("QuietTrain")),
    "time_first": Report("time on the first axis, a layer after it", model("TimeFirst"), layer="head.weight", data=pictures),
    "tagger": Report("padding that attention is told of", loss("first_token", "Tagger"), layer="head.weight", data=padded),
    "experts": Report("a mixture of experts", model("Experts")),
    "forces": Report("`autograd.grad` in the forward pass", model("Forces")),
    "broken_backward": Report(
        "a backward pass that raises", model("BrokenBackward"), ["training the model raised RuntimeError: no gradient of this"]
    ),
    "time_first_layer": Report(
        "a layer whose own input has time on the first axis",
        model("TimeFirst"),
        ["the sample is not on its first axis", "--set select-layer.layer=NAME"],
        data=pictures,
    ),
    "scripted_model": Report(
        "torch.jit.script", model("scripted"), ["model() returned a RecursiveScriptModule", "without torch.jit.script"]
    ),
    "traced_model": Report("torch.jit.trace", model("traced"), ["model() returned a TopLevelTracedModule", "torch.jit.trace"]),
    "model_instance": Report("a model instead of its class", model("instance"), ["is a model already (Net)", "def make()"]),
    "functional_dropout": Report(
        "dropout in eval mode", model("Dropping"), ["the model is random in eval mode", "self.training"]
    ),
    "counting": Report(
        "a state that eval passes change",
        model("Counting"),
        ["the model keeps a state between passes in eval mode"],
    ),
    "trimming": Report("padding that is trimmed to the batch", model("Trimming"), [MIXES, "alone"], data=padded),
}
DATA = {
    "numpy_augmentation": Report(
        "augmentation by numpy's and Python's generators",
        model("Net") | {"train": "data:Augmented", "test": "data:Augmented"},
    ),
    "unseeded": Report(
        "augmentation by a generator without a seed",
        model("Net") | {"train": "data:Unseeded", "test": "data:Unseeded"},
        ["is another item each time it is asked for", "seed"],
    ),
    "loader": Report("a DataLoader", model("Net") | {"train": "data:loader"}, ["train is a DataLoader", "loader.dataset"]),
    "two_inputs": Report(
        "x as a tuple of inputs",
        model("TwoInputs") | {"train": "data:Pairs", "test": "data:Pairs"},
        ["model(x) gets x as one argument", "forward()", "model(*x)"],
    ),
}
CODE = {
    "argparse_at_import": Report("`argparse` while importing", {"model": "options:Net"}),
    "relative_package": Report("a package with relative imports", {"model": "net.model:Net"}, layer="head.weight"),
    "sibling_named_stages": Report(
        "a file named like a package of ocd (`stages`, `ocd_cli`)",
        {"model": "needs_stages:Net"},
        ["has the name of a package of ocd's own"],
        data=beside_stages,
    ),
    "default_dtype_double": Report("float64 as torch's default dtype", {"model": "double_default:Net"}, until="infer"),
    "grad_disabled_at_import": Report("gradients switched off while importing", {"model": "no_gradients:Net"}),
}
REPORTS = {"Losses": LOSSES, "Outputs": OUTPUTS, "Models": MODELS, "Data": DATA, "Code": CODE}
ALL = {name: report for group in REPORTS.values() for name, report in group.items()}


def table() -> str:
    """Every report as a row of Markdown."""
    lines = []
    for title, group in REPORTS.items():
        lines += [f"| {title} | |", "|---|---|"]
        for report in group.values():
            refused = f"refused: \u201c{report.says[0]} \u2026\u201d" if report.says else "works"
            lines.append(f"| {report.what} | {refused} |")
        lines.append("")
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    print(table())
