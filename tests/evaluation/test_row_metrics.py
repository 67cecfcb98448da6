"""The metrics of a row: what samples contribute, against loops, scipy and scikit-learn; and why a metric is missing."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gathering import CLASSES, MEMBERS, ROUNDING, SAMPLES, Bare, Binary, Classes, Numbers, Other, figures, gathered, labels_of
from overfitters import random
from scipy.stats import norm
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from torch import nn

from stages.evaluation.metrics import Gathered

# Classification


def test_figures_of_a_classifier():
    members, y = random(MEMBERS, SAMPLES, CLASSES), labels_of(SAMPLES)
    p = torch.softmax(members, dim=2).mean(0).numpy()
    found = gathered(Classes(), members, y)
    got, wrong = figures(found), p.argmax(1) != y.numpy()
    entropy = -(p * np.log(p)).sum(1)
    of_members = torch.distributions.Categorical(logits=members).entropy().mean(0).numpy()
    wanted = {
        "loss": log_loss(y, p),
        "cross_entropy": log_loss(y, p),
        "accuracy": 1 - wrong.mean(),
        "brier_score": brier_score_loss(y, p, labels=range(CLASSES), scale_by_half=False),
        "auroc_of_confidence": roc_auc_score(wrong, -p.max(1)),
        "auroc_of_disagreement": roc_auc_score(wrong, entropy - of_members),
    }
    gaps = np.zeros(15)
    for confidence, right in zip(p.max(1), ~wrong, strict=True):
        gaps[math.ceil(confidence * 15) - 1] += confidence - right
    wanted["calibration_error"] = np.abs(gaps).sum() / SAMPLES
    # The combination adds a float32 logarithm of the number of members.
    assert got == pytest.approx(wanted, abs=1e-6)
    assert found.missing == {}


@pytest.mark.parametrize("shape", [(), (1,)])
def test_figures_of_a_binary_classifier(shape):
    members, y = random(MEMBERS, SAMPLES, *shape), labels_of(SAMPLES, *shape, classes=2).double()
    p, labels = torch.sigmoid(members).mean(0).flatten().numpy(), y.flatten().numpy()
    got, wrong = figures(gathered(Binary(), members, y)), (p > 0.5) != labels
    assert got["accuracy"] == pytest.approx(1 - wrong.mean(), abs=ROUNDING)
    # The task has no metric of this name, but its outputs and labels give it.
    assert got["cross_entropy"] == pytest.approx(log_loss(labels, p), abs=ROUNDING)
    # Over both classes, as for more of them: twice the usual one.
    assert got["brier_score"] == pytest.approx(2 * np.mean((p - labels) ** 2), abs=ROUNDING)
    assert got["auroc_of_confidence"] == pytest.approx(roc_auc_score(wrong, -np.maximum(p, 1 - p)), abs=ROUNDING)


def test_figures_of_a_segmentation():
    """Many predictions a sample: each figure is the mean over all of them, and errors are no longer one a sample."""
    members, y = random(MEMBERS, 12, CLASSES, 4, 2), labels_of(12, 4, 2)
    found = gathered(Classes(), members, y, batch=5)
    got = figures(found)
    p = torch.softmax(members, dim=2).mean(0).movedim(1, -1).reshape(-1, CLASSES).numpy()
    flat = y.flatten().numpy()
    assert got["cross_entropy"] == pytest.approx(log_loss(flat, p, labels=range(CLASSES)), abs=1e-6)
    assert got["accuracy"] == pytest.approx(np.mean(p.argmax(1) == flat), abs=1e-6)
    assert got["brier_score"] == pytest.approx(np.mean(((p - np.eye(CLASSES)[flat]) ** 2).sum(1)), abs=1e-6)
    gaps = np.zeros(15)
    np.add.at(gaps, np.ceil(p.max(1) * 15).astype(int) - 1, p.max(1) - (p.argmax(1) == flat))
    assert got["calibration_error"] == pytest.approx(np.abs(gaps).sum() / len(flat), abs=1e-6)
    assert not {"auroc_of_disagreement", "auroc_of_confidence"} & got.keys()
    assert found.missing == dict.fromkeys(("auroc_of_disagreement", "auroc_of_confidence"), "a sample has several predictions")


def test_the_loss_of_a_sample_is_the_tasks():
    members, y = random(1, SAMPLES, CLASSES), labels_of(SAMPLES)
    wanted = F.cross_entropy(members[0], y, reduction="none").numpy()
    np.testing.assert_allclose(gathered(Classes(), members, y).values("loss"), wanted, rtol=ROUNDING)


@pytest.mark.parametrize("batch", [1, 7, SAMPLES])
def test_batches_do_not_matter(batch):
    members, y = random(MEMBERS, SAMPLES, CLASSES), labels_of(SAMPLES)
    found, wanted = (figures(gathered(Classes(), members, y, batch=size)) for size in (batch, 17))
    assert found == pytest.approx(wanted, abs=ROUNDING)


def test_a_perfect_prediction():
    y = labels_of(SAMPLES)
    found = gathered(Classes(), 1e3 * F.one_hot(y, CLASSES).double().unsqueeze(0), y)
    got = figures(found)
    wanted = {"accuracy": 1, "brier_score": 0, "calibration_error": 0, "cross_entropy": 0, "loss": 0}
    # The weights are of 1/40, which is rounded.
    assert got == pytest.approx(wanted, abs=ROUNDING)
    assert found.missing["auroc_of_confidence"] == "there are no errors to find"


def test_a_prediction_that_is_sure_and_wrong():
    y = labels_of(SAMPLES)
    found = gathered(Classes(), 1e3 * F.one_hot((y + 1) % CLASSES, CLASSES).double().expand(2, -1, -1), y)
    got = figures(found)
    # (0 − 1)² for the true class and (1 − 0)² for the one that is guessed.
    names = ("accuracy", "brier_score", "calibration_error")
    assert [got[name] for name in names] == pytest.approx([0, 2, 1], abs=ROUNDING)
    assert found.missing == dict.fromkeys(("auroc_of_disagreement", "auroc_of_confidence"), "every prediction is an error")


@pytest.mark.parametrize(("members", "why"), [(1, "its prediction has one member"), (MEMBERS, "its members agree")])
def test_members_that_do_not_disagree_rank_nothing(members, why):
    found = gathered(Classes(), random(1, SAMPLES, CLASSES).expand(members, -1, -1), labels_of(SAMPLES))
    assert "auroc_of_confidence" in found.statistics()
    assert "auroc_of_disagreement" not in found.statistics()
    assert found.missing == {"auroc_of_disagreement": why}


def test_outputs_that_are_no_logits():
    class Probabilities(Bare):
        kind = "classification"

    found = gathered(Probabilities(), random(2, SAMPLES, 4), random(SAMPLES, 3))
    assert found.statistics().keys() == {"loss"}
    names = ("brier_score", "calibration_error", "auroc_of_disagreement", "auroc_of_confidence")
    assert found.missing == dict.fromkeys(names, "outputs and labels are not logits and class numbers")


# Regression


@pytest.mark.parametrize("shape", [(), (1,), (3, 2)])
def test_figures_of_a_regression(shape):
    members, y = random(MEMBERS, SAMPLES, *shape), random(SAMPLES, *shape, seed=1)
    found = gathered(Numbers(), members, y, variance=0.3)
    mean, spread = members.mean(0).numpy(), np.sqrt(members.numpy().var(0) + 0.3)
    residual = y.numpy() - mean
    wanted = {
        "loss": np.mean(residual**2),
        "mse": np.mean(residual**2),
        "mae": np.mean(np.abs(residual)),
        "rmse": np.sqrt(np.mean(residual**2)),
        "log_likelihood": norm.logpdf(y.numpy(), mean, spread).mean(),
        "coverage": np.mean((y.numpy() >= norm.ppf(0.025, mean, spread)) & (y.numpy() <= norm.ppf(0.975, mean, spread))),
    }
    assert figures(found) == pytest.approx(wanted, abs=ROUNDING)
    assert found.missing == {}


def test_one_member_has_no_variance_of_its_own():
    members, y = random(1, SAMPLES), random(SAMPLES, seed=1)
    found = figures(gathered(Numbers(), members, y, variance=4.0))
    assert found["log_likelihood"] == pytest.approx(norm.logpdf(y.numpy(), members[0].numpy(), 2).mean(), abs=ROUNDING)


def test_a_true_variance_covers_95_of_100():
    members, y = random(2, 20_000), random(20_000, seed=1)
    # Around the members' mean, whose variance varies: residuals of just the variance that is said.
    y = members.mean(0) + y * (members.var(0, correction=0) + 0.5).sqrt()
    # 20,000 samples leave 0.0015 of chance.
    assert figures(gathered(Numbers(), members, y, variance=0.5))["coverage"] == pytest.approx(0.95, abs=0.006)
    assert figures(gathered(Numbers(), members, y, variance=0.05))["coverage"] < 0.9


def test_a_column_beside_a_vector():
    members, y = random(MEMBERS, SAMPLES, 1), random(SAMPLES, seed=1)
    found, wanted = (figures(gathered(Numbers(), m, y, variance=0.3)) for m in (members, members.squeeze(2)))
    assert found == pytest.approx(wanted, abs=ROUNDING)


def test_without_validation_rows_there_is_no_likelihood():
    found = gathered(Numbers(), random(2, SAMPLES), random(SAMPLES, seed=1))
    assert found.statistics().keys() == {"loss", "mse", "mae", "rmse"}
    assert found.missing == dict.fromkeys(("log_likelihood", "coverage"), "there are no validation rows to fit a variance on")


@pytest.mark.parametrize("output", [random(2, SAMPLES, 3), {"a": random(2, SAMPLES, 2)}], ids=["wide", "dict"])
def test_outputs_and_labels_of_different_forms(output):
    found, one = Gathered(Bare(), 1.0), {"a": random(SAMPLES, 2)} if isinstance(output, dict) else random(SAMPLES, 3)
    found.add(output, one, random(SAMPLES, 2))
    assert found.statistics().keys() == {"loss"}
    names = ("rmse", "mae", "log_likelihood", "coverage")
    assert found.missing == dict.fromkeys(names, "outputs and labels have different forms")


def test_a_task_of_another_kind_has_its_loss_alone():
    found = gathered(Other(), random(2, SAMPLES), random(SAMPLES, seed=1))
    assert found.statistics().keys() == {"loss"}
    assert found.missing == {}


# The variance of residuals


def test_gathering_keeps_no_graph():
    model, x, y = nn.Linear(4, CLASSES).double(), random(SAMPLES, 4), labels_of(SAMPLES)
    members = model(x).expand(MEMBERS, -1, -1)
    found = Gathered(Classes())
    found.add(members, Classes().combine(members), y)
    assert all(isinstance(part, np.ndarray) and part.dtype == np.float64 for parts in found.parts.values() for part in parts)
