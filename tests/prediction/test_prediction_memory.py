"""How a GPU predicts: as much at once as its memory holds, and in half precision where that does not show."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from networks import describe, make

from stages.prediction import predicting, predictor
from stages.prediction.predicting import prediction_batch
from stages.run_directory.descriptions import DenoiserDescription

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NUMEL = 84 * 120


@pytest.fixture
def card(monkeypatch):
    """A GPU with so many GiB free, in a machine with as many."""

    def holds(gib):
        for module in (predicting, predictor):
            monkeypatch.setattr(module, "free_on_gpu", lambda device: gib << 30)
        monkeypatch.setattr(predicting, "available_memory", lambda: gib << 30)

    return holds


def rows_of(preset, device):
    given = describe(preset, (84, 120), {"layer_input": 120, "activation": 84, "base_output": 10})
    for name in ("lr", "batch_size"):
        given.pop(name)
    return predictor._denoised_at_once(None, DenoiserDescription(**given, schedule="ddpm"), device)


def test_the_papers_unet_is_given_many_deltas_on_a_large_card(card):
    assert rows_of("paper", CPU) == 4
    card(80)
    assert 64 <= rows_of("paper", GPU) <= 128
    card(8)
    assert 4 < rows_of("paper", GPU) < 16


def test_inputs_at_once(card):
    card(80)
    assert prediction_batch(50_000, NUMEL, 5, CPU) == 48
    assert prediction_batch(50_000, NUMEL, 5, GPU) == 1024
    # Ancestral sampling draws ten times as much.
    assert prediction_batch(50_000, NUMEL, 5, GPU, draws=10) == 528
    # A gigabyte for each input beside its deltas.
    assert prediction_batch(1 << 30, NUMEL, 5, GPU) == 16
    card(1)
    assert prediction_batch(1 << 30, NUMEL, 5, GPU) == 1


@dataclass(frozen=True)
class Drawing:
    """What is looked at of a generator."""

    denoiser: Any
    device: torch.device
    half: bool = False


@pytest.mark.parametrize(("change", "preset", "device", "wanted"), [
    (5e-4, "small", GPU, True),
    (2e-3, "small", GPU, False),
    (0.0, "mlp", GPU, False),
    (0.0, "small", CPU, False),
])  # fmt: skip
def test_half_precision(change, preset, device, wanted):
    denoiser = make(preset, (3, 4), **({"multipliers": [1, 2]} if preset == "small" else {}))
    outputs = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    found = predictor.in_half(Drawing(denoiser, device), lambda one: {"logits": outputs * (1 + change * one.half)})
    assert found.half == wanted
