"""Trained weights as people have them: which file, entry and prefix is taken, what is ignored, and what is refused."""

import argparse
import collections
import json
import pathlib
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stages.foundation.errors import DataError
from stages.tasks.checkpoints import import_weights


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 3)


class Normed(nn.Module):
    def __init__(self, norm=nn.utils.parametrizations.weight_norm):
        super().__init__()
        self.a, self.head = norm(nn.Linear(4, 8)), nn.Linear(8, 3)


@dataclass
class Options:
    lr: float = 1e-3


torch.manual_seed(0)
STATE = dict(Net().state_dict())
EMA = {name: value + 1 for name, value in STATE.items()}
LIGHTNING = {"epoch": 1, "callbacks": {}, "optimizer_states": [{"state": {0: {"a": torch.ones(2)}}}]}


def under(prefix, state=STATE):
    return {prefix + name: value for name, value in state.items()}


OPTIONS = argparse.Namespace(lr=np.float64(1e-3), path=pathlib.PurePosixPath("x"))
# What is saved; the entry, prefix, ignored keys and others that the summary names.
TAKEN = {
    "plain": (STATE, {}),
    "data parallel": (under("module."), {"prefix": "module."}),
    "compiled": (under("_orig_mod."), {}),
    "compiled inside": (under("_orig_mod.module."), {"prefix": "module."}),
    "compiled outside": (under("module._orig_mod."), {"prefix": "module."}),
    "compiled part": ({name.replace("body.", "body._orig_mod."): value for name, value in STATE.items()}, {}),
    "nanoGPT": ({"model": under("_orig_mod."), "optimizer": {}, "iter_num": 3}, {"key": "model"}),
    "Lightning": (LIGHTNING | {"state_dict": under("model.")}, {"key": "state_dict", "prefix": "model."}),
    "Lightning with a loss": (
        LIGHTNING | {"state_dict": under("net.") | {"criterion.weight": torch.ones(3)}},
        {"key": "state_dict", "prefix": "net.", "ignored": ["criterion.weight"]},
    ),
    "Lightning's options": (
        {
            "state_dict": under("a.b."),
            "hyper_parameters": OPTIONS,
        },
        {"key": "state_dict", "prefix": "a.b."},
    ),
    "averaged beside": (
        {"state_dict": STATE, "state_dict_ema": EMA},
        {"key": "state_dict", "others": ["state_dict_ema"]},
    ),
    "averaged first": ({"params_ema": EMA, "params": STATE}, {"key": "params", "others": ["params_ema"]}),
    "averaged by a prefix": (under("model_ema.", EMA) | under("model."), {"prefix": "model.", "others": ["model_ema"]}),
    "averaged without the prefix": (
        {"state_dict": under("net.") | {"criterion.weight": torch.ones(3)}, "ema": EMA},
        {"key": "state_dict", "prefix": "net.", "ignored": ["criterion.weight"], "others": ["ema"]},
    ),
    "averaged alone": (
        {"ema_state_dict": under("module.", STATE) | {"n_averaged": torch.tensor(4)}},
        {"key": "ema_state_dict", "prefix": "module.", "ignored": ["n_averaged"]},
    ),
    "a figure beside": ({"net": STATE, "acc": np.float32(91.2), "seen": collections.defaultdict(int)}, {"key": "net"}),
    "names beside": ({"model": STATE, "classes": np.array(["a", "b"])}, {"key": "model"}),
    "a pair": ((STATE, 3), {"key": "0"}),
    "numpy": ({name: value.numpy() for name, value in STATE.items()}, {}),
    "a text inside": (collections.OrderedDict([*STATE.items(), ("meta", "v1")]), {}),
    "half": ({name: value.half() if value.is_floating_point() else value for name, value in STATE.items()}, {}),
    "before num_batches_tracked": ({name: value for name, value in STATE.items() if "num_batches" not in name}, {}),
}


def check(model, wanted=STATE):
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, wanted[name].to(value.dtype), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", TAKEN)
def test_what_is_taken(kind, tmp_path):
    saved, said = TAKEN[kind]
    torch.save(saved, tmp_path / "weights.pt")
    model = Net()
    found = import_weights(tmp_path / "weights.pt", model)
    check(model)
    assert found.summary() == {"imported": "weights.pt", **said}
    assert (found.sentence() == "") == (not said)


def test_another_entry_by_its_name(tmp_path):
    torch.save(TAKEN["averaged beside"][0], tmp_path / "weights.pt")
    model = Net()
    assert import_weights(tmp_path / "weights.pt", model, "state_dict_ema").key == "state_dict_ema"
    check(model, EMA)
    with pytest.raises(DataError, match="no entry 'ema' with keys of the model") as error:
        import_weights(tmp_path / "weights.pt", Net(), "ema")
    assert error.value.hint == "it has state_dict, state_dict_ema"


def test_another_prefix_by_its_name(tmp_path):
    torch.save(TAKEN["averaged by a prefix"][0], tmp_path / "weights.pt")
    model = Net()
    assert import_weights(tmp_path / "weights.pt", model, "model_ema").prefix == "model_ema."
    check(model, EMA)


class Versioned(nn.Module):
    """Reads files of its first version in another way."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") is None:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] + 100
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_versions_of_modules_are_kept(tmp_path, prefix):
    whole = nn.Module()
    whole.a = Versioned()
    wrapped = whole
    if prefix:
        wrapped = nn.Module()
        wrapped.add_module(prefix[:-1], whole)
    torch.save(wrapped.state_dict(), tmp_path / "weights.pt")
    model = nn.Module()
    model.a = Versioned()
    import_weights(tmp_path / "weights.pt", model)
    assert model.a.weight.tolist() == [0, 0]


class Choosy(Net):
    def load_state_dict(self, state, strict=True):
        raise ValueError("needs version 3")


def test_what_the_models_own_loading_says_is_told(tmp_path):
    torch.save(STATE, tmp_path / "weights.pt")
    with pytest.raises(DataError, match="needs version 3"):
        import_weights(tmp_path / "weights.pt", Choosy())


def test_of_equal_prefixes_the_first_is_taken(tmp_path):
    torch.save(under("teacher.", EMA) | under("student."), tmp_path / "weights.pt")
    found = import_weights(tmp_path / "weights.pt", Net())
    assert (found.prefix, found.others) == ("teacher.", ["student"])


def test_the_models_own_loading_decides(tmp_path):
    """Weights of torch's old weight_norm load into the new one."""
    old, model = Normed(nn.utils.weight_norm), Normed()
    torch.save(old.state_dict(), tmp_path / "weights.pt")
    import_weights(tmp_path / "weights.pt", model)
    torch.testing.assert_close(model.a.weight, old.a.weight)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_and_folders(tmp_path, suffix):
    names = sorted(STATE)
    parts = {f"model-0000{n}.{suffix}": {name: STATE[name] for name in names[n::2]} for n in (0, 1)}
    for file, part in parts.items():
        (save_file if suffix == "safetensors" else torch.save)(part, tmp_path / file)
    stem = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    index = tmp_path / f"{stem}.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in parts.items() for name in part}}))
    for path in (index, tmp_path):
        model = Net()
        assert import_weights(path, model).file == path.name
        check(model)
    (tmp_path / f"model-00001.{suffix}").unlink()
    with pytest.raises(DataError, match=f"model-00001.{suffix}, which is missing"):
        import_weights(index, Net())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"weight_map": {"a": "../elsewhere.safetensors"}}', "expected names of files beside it"),
        ('{"weight_map": {"a": 3}}', "no index of weights"),
        ('{"map": {}}', "no index of weights: 'weight_map'"),
        ("[]", "no index of weights"),
        ("{", "no index of weights"),
    ],
)
def test_an_index_that_is_none(tmp_path, text, message):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        import_weights(path, Net())


REFUSED = {
    "a whole model": (nn.Linear(4, 3), "Linear, which cannot be read without running code", "model.state_dict()"),
    "an object beside": (
        {"state_dict": STATE, "options": Options()},
        "Options, which cannot be read without running code",
        "model.state_dict()",
    ),
    "a list": ([1, 2], "no state dict of tensors", "model.state_dict()"),
    "no tensors": ({"a": 1}, "no state dict of tensors", "model.state_dict()"),
    "another model": ({"weight": torch.ones(3)}, "missing: body.0.weight", "task.model"),
    "in two parts": ({"encoder": {"body.0.weight": torch.ones(8, 4)}}, "missing: head.weight", "task.model"),
    "another shape": (STATE | {"head.weight": torch.ones(5, 8)}, r"head.weight: the file has \(5, 8\)", "task.model"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind, tmp_path):
    saved, message, hint = REFUSED[kind]
    torch.save(saved, tmp_path / "weights.pt")
    with pytest.raises(DataError, match=message) as error:
        import_weights(tmp_path / "weights.pt", Net())
    assert hint in error.value.hint


def test_an_archive_of_code_is_named(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "weights.pt")
    with pytest.raises(DataError, match="TorchScript archive") as error:
        import_weights(tmp_path / "weights.pt", Net())
    assert "torch.jit.load(FILE).state_dict()" in error.value.hint


def test_the_command_says_what_it_took_and_remembers_the_entry(ocd, project):
    folder = project(until="train-base")
    state = torch.nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).state_dict()
    torch.save({"net": under("module.", state), "net_ema": under("module.", state)}, folder.root / "w.pt")
    result = ocd(folder, "train-base", "--force", "--weights", folder.root / "w.pt")
    taken = "w.pt: its entry 'net' is taken; the prefix 'module.' of its keys is dropped; net_ema fits as well"
    assert taken in result.stderr
    assert folder.summary("train-base")["others"] == ["net_ema"]
    ocd(folder, "train-base", "--force", "--weights", folder.root / "w.pt", "--weights-key", "net_ema")
    assert folder.summary("train-base")["key"] == "net_ema"
    assert ocd.json(folder, "status")["stages"]["train-base"]["state"] == "done"
    ocd(folder, "train-base", "--weights", folder.root / "w.pt", "--weights-key", "net", code=3)


def test_an_entry_of_no_file_is_refused(ocd, project):
    message = ocd(project(), "train-base", "--weights-key", "ema", code=2).stderr
    assert "task.weights_key = 'ema', and no weights are named to take it from" in message
    assert "--weights FILE --weights-key NAME" in message
