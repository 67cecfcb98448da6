"""The best output that is the same for every sample, against what is known of it, and the tasks that have none."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stages.tasks import constant as under_test
from stages.tasks.constant import Constant, best_constant
from stages.tasks.data import ArrayDataset, Split
from stages.tasks.losses import LOSSES, OTHER
from stages.tasks.protocol import Task

ROWS = 300


class OneLoss(Task):
    def __init__(self, loss):
        self.kind = OTHER
        self.loss = LOSSES[loss][0] if isinstance(loss, str) else loss


class Gives(nn.Module):
    """Outputs like this one, or a dict."""

    def __init__(self, like):
        super().__init__()
        self.like = like

    def forward(self, x):
        return {"a": x} if self.like is None else self.like.expand(len(x), *self.like.shape)


def skewed(*shape):
    """Targets of mean 7 whose median is another, and never the same twice."""
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(0)).exp() * 3 + 2


def classes():
    return torch.tensor([0, 0, 0, 1, 1, 2]).repeat(ROWS // 6)


def found(loss, y, like, judged=None):
    x = torch.zeros(len(y), 2)
    splits = [Split(ArrayDataset(x[: len(labels)], labels)) for labels in (y, y if judged is None else judged)]
    return best_constant(OneLoss(loss), Gives(like), *splits, seed=0)


@pytest.mark.parametrize("shape", [(), (1,), (4, 3)])
def test_of_squares_the_mean(shape):
    y, judged = skewed(*shape), skewed(*shape)[:40]
    result = found("mse", y, torch.zeros(shape), judged)
    assert result.loss == pytest.approx(float((judged - y.mean(0)).square().mean()), rel=1e-5)
    assert result.targets == pytest.approx((float(y.mean()), float(y.std(correction=0))), rel=1e-5)


def test_of_absolute_errors_the_median():
    y = skewed(1)
    # Near its lowest point the mean is all but flat, and has corners.
    assert found("mae", y, torch.zeros(1)).loss == pytest.approx(float((y - y.median()).abs().mean()), rel=1e-3)


def test_of_cross_entropies_the_frequencies():
    y, judged = classes(), torch.tensor([2, 1])
    result = found("cross_entropy", y, torch.zeros(3), judged)
    assert result.loss == pytest.approx(-(np.log(1 / 6) + np.log(1 / 3)) / 2, rel=1e-3)
    assert result.targets is None
    y = (classes() == 0).float().unsqueeze(1)
    assert found("binary_cross_entropy", y, torch.zeros(1)).loss == pytest.approx(np.log(2), rel=1e-4)


def test_labels_of_any_structure_and_losses_that_work_in_place():
    def loss(output, y):
        output.sub_(1)
        return (output - y).square().flatten(1).mean(1)

    y = skewed(2)
    assert found(loss, y, torch.zeros(2)).loss == pytest.approx(float((y - y.mean(0)).square().mean()), rel=1e-4)


def out_of(kind):
    raise kind("not for a constant")


@pytest.mark.parametrize(
    ("loss", "like"),
    [
        (lambda output, y: out_of(ValueError), torch.zeros(1)),
        (lambda output, y: out_of(SystemExit), torch.zeros(1)),
        (lambda output, y: (output - y).square(), torch.zeros(1)),
        (lambda output, y: (output * float("nan")).flatten(), torch.zeros(1)),
        (lambda output, y: (output - y).square().flatten() / 0, torch.zeros(1)),
        (lambda output, y: y.flatten(), torch.zeros(1)),
        (lambda output, y: (output.float() - y).square().flatten(), torch.zeros(1, dtype=torch.long)),
        (lambda output, y: F.mse_loss(output["a"], y, reduction="none").mean(1), None),
        ("mse", torch.zeros(5)),
        ("mse", torch.zeros(1001, 1000)),
    ],
    ids=[
        "raises",
        "exits",
        "no value a sample",
        "no number",
        "infinite",
        "no gradient",
        "integers",
        "a dict",
        "another shape",
        "large",
    ],
)
def test_no_constant_and_no_error(loss, like):
    assert found(loss, skewed(1), like) is None


def test_a_large_output_is_found_on_fewer_samples(monkeypatch):
    monkeypatch.setattr(under_test, "MOST_NUMBERS", 40)
    monkeypatch.setattr(under_test, "NUMBERS_AT_ONCE", 12)
    y = skewed(4)
    result = found("mse", y, torch.zeros(4))
    best = float((y - y.mean(0)).square().mean())
    assert best < result.loss < 3 * best


def test_no_random_draw_is_changed():
    def noisy(output, y):
        torch.rand(3), np.random.rand(), random.random()
        return (output - y).square().flatten()

    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert isinstance(found(noisy, skewed(1), torch.zeros(1)), Constant)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]
