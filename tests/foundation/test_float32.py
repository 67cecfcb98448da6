"""Products of float32 are exact while the library computes, whatever was set, and whatever the user's code sets."""

import os
import subprocess
import sys

import pytest
import torch

from stages.foundation import float32
from stages.foundation.float32 import EXACT, FAST, Precision, fast_float32
from stages.foundation.torch_state import their_torch, usual_torch

BACKENDS = torch.backends
NEW = hasattr(BACKENDS.cuda.matmul, "fp32_precision")


def by_older():
    BACKENDS.cuda.matmul.allow_tf32 = True
    BACKENDS.cudnn.allow_tf32 = True


def by_newer():
    BACKENDS.cuda.matmul.fp32_precision = "tf32"
    BACKENDS.cudnn.conv.fp32_precision = "tf32"


def by_both():
    BACKENDS.cuda.matmul.allow_tf32 = False
    BACKENDS.cuda.matmul.fp32_precision = "tf32"


def widely():
    BACKENDS.fp32_precision = "tf32"


SETTINGS = {
    "nothing": lambda: None,
    "older": by_older,
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    **({"newer": by_newer, "both": by_both, "widely": widely} if NEW else {}),
}


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    # There all of it is looked at.
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)


@pytest.fixture(params=SETTINGS)
def set_it(request):
    """A way to ask for TF32; what was set is put back."""
    before, wide = Precision.now(), getattr(BACKENDS, "fp32_precision", None)
    yield SETTINGS[request.param]
    if wide is not None:
        BACKENDS.fp32_precision = wide
    before.set()


def test_what_was_set_is_off_and_put_back(set_it):
    set_it()
    before = Precision.now()
    with usual_torch():
        assert Precision.now() == EXACT
    assert Precision.now() == before


def test_what_their_code_sets_is_off_again(set_it):
    with usual_torch():
        with their_torch():
            set_it()
        assert Precision.now() == EXACT


def test_training_may_be_inexact(set_it):
    with usual_torch():
        with fast_float32():
            assert Precision.now() == FAST
            with their_torch():
                BACKENDS.cuda.matmul.allow_tf32 = False
            assert Precision.now() == FAST
        assert Precision.now() == EXACT


def test_a_torch_without_the_newer_interface(monkeypatch):
    monkeypatch.setattr(float32, "_PLACES", ())
    exact, fast = Precision("highest", False, ()), Precision("high", True, ())
    monkeypatch.setattr(float32, "EXACT", exact)
    monkeypatch.setattr(float32, "FAST", fast)
    before = Precision.now()
    with usual_torch():
        assert Precision.now() == exact
        with their_torch():
            by_older()
        assert Precision.now() == exact
    assert Precision.now() == before


def test_the_environment_has_no_say():
    code = (
        "import torch; from stages.foundation.torch_state import usual_torch\n"
        "before = torch.backends.cuda.matmul.allow_tf32\n"
        "with usual_torch(): print(before, torch.backends.cuda.matmul.allow_tf32, torch.backends.cuda.matmul.allow_tf32)"
    )
    environment = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert found.stdout.split() == ["True", "False", "False"]
