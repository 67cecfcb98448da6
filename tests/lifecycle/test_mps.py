"""Apple's GPU, which no test has: asked for and absent; and pretended, as far as a tensor that says it is there goes."""

import pytest
import torch

from stages.foundation.no_doubles import doubles_for, where_doubles_are
from stages.foundation.seeds import global_seed
from stages.lifecycle.context import RunContext
from stages.run_directory.project import load_project

MPS, CPU = torch.device("mps"), torch.device("cpu")


class OnMps(torch.Tensor):
    """Says that it is there, and refuses what cannot be done there."""

    device = MPS

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.double:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture
def there(monkeypatch):
    """A machine that has one."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    called = []
    for name in ("synchronize", "get_rng_state", "set_rng_state", "manual_seed"):
        monkeypatch.setattr(torch.mps, name, lambda *args, name=name: called.append((name, *args)) or name)
    return called


def context(folder, device):
    return RunContext(load_project(folder.config, values={"run.device": device}))


def test_asked_for_and_absent(project, ocd, finished):
    says = (
        "error: run.device = 'mps', but torch sees no such device\n  use --device cpu; mps takes a Mac of Apple's own chips\n"
    )
    folder = project()
    for words in (["train-base"], ["run"], ["train-base", "--dry-run"]):
        assert ocd(folder, *words, "--quiet", "--device", "mps", code=2).stderr == says
    assert ocd(finished, "collect", "--force", "--quiet", "--device", "mps", code=2).stderr == says
    ocd(finished, "status", "--device", "mps")


def test_it_is_taken_only_when_asked_for(project, there, monkeypatch):
    folder = project()
    assert context(folder, "auto").device == CPU
    asked = context(folder, "mps")
    assert asked.device == MPS
    asked.wait()
    assert there == [("synchronize",)]
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(Exception, match="under torchrun"):
        context(folder, "mps").device  # noqa: B018


def test_its_generator_is_seeded_and_restored(there):
    with global_seed(1, "x"):
        ((first,), (second, seed)) = there
        assert (first, second) == ("get_rng_state", "manual_seed")
        assert seed > 0
    assert there[2:] == [("set_rng_state", "get_rng_state")]


def test_a_model_of_float64_is_refused(project, ocd, there):
    folder = project({"task": {"model": "mymodel:double"}})
    with (folder.root / "mymodel.py").open("a") as stream:
        stream.write("\n\ndef double():\n    return net().double()\n")
    ocd(folder, "train-base")
    result = ocd(folder, "select-layer", "--quiet", "--device", "mps", code=2)
    assert result.stderr == "error: the model has weights of float64, which mps lacks\n  use --device cpu\n"


def test_float64_is_computed_on_the_cpu():
    values = torch.arange(3.0).as_subclass(OnMps)
    with pytest.raises(TypeError), doubles_for(CPU):
        values.double()
    with doubles_for(MPS):
        found = values.double()
    assert (found.device, found.dtype) == (CPU, torch.float64)
    assert [leaf.device for leaf in where_doubles_are((values, torch.ones(2)))] == [CPU, CPU]
