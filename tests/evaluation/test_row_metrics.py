"""The metrics of a row: what samples contribute, against loops, scipy and scikit-learn; and why a metric is missing."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from overfitters import random
from scipy.stats import norm
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from torch import nn

from stages.evaluation.metrics import Gathered, Residuals, disagreement, probabilities
from stages.tasks.losses import binary_accuracy, binary_cross_entropy, cross_entropy, mean_binary_probability, mse
from stages.tasks.protocol import Task

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
# Sums in another order, in float64.
ROUNDING = 1e-12
SAMPLES, CLASSES, MEMBERS = 40, 3, 5


def labels_of(*shape, seed=0, classes=CLASSES):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


class Classes(Task):
    kind = "classification"

    def loss(self, output, y):
        return cross_entropy(output, y)


class Binary(Task):
    kind = "classification"

    def loss(self, output, y):
        return binary_cross_entropy(output, y)

    def metrics(self, output, y):
        return {"accuracy": binary_accuracy(output, y)}

    def combine(self, outputs):
        return mean_binary_probability(outputs)


class Numbers(Task):
    kind = "regression"

    def loss(self, output, y):
        return mse(output, y)


class Other(Task):
    def loss(self, output, y):
        return mse(output, y)


class Bare(Numbers):
    """Its loss and metrics take whatever there is."""

    def loss(self, output, y):
        return (output["a"] if isinstance(output, dict) else output).reshape(len(y), -1).sum(1)

    def metrics(self, output, y):
        return {}


def gathered(task, members, y, *, variance=None, batch=17):
    """What comes of (E, N, …) in batches of unequal sizes."""
    found = Gathered(task, variance)
    for start in range(0, len(y), batch):
        part = members[:, start : start + batch]
        found.add(part, task.combine(part), y[start : start + batch])
    return found


def figures(found):
    """Over all samples, by name."""
    statistics, samples = found.statistics(), len(found.values("loss"))
    return {name: float(statistic(np.full((1, samples), 1 / samples))[0]) for name, statistic in statistics.items()}


# Probabilities


def test_probabilities_of_classes():
    logits, y = random(4, 3, 2, 5), labels_of(4, 2, 5)
    p, labels = probabilities(logits, y)
    assert p.shape == (4, 3, 10)
    torch.testing.assert_close(p, logits.exp().div(logits.exp().sum(1, keepdim=True)).flatten(2))
    assert torch.equal(labels, y.flatten(1))
    torch.testing.assert_close(p.sum(1), torch.ones(4, 10, dtype=torch.float64))


@pytest.mark.parametrize("shapes", [((6,), (6,)), ((6, 1), (6,)), ((6,), (6, 1)), ((6, 1, 2, 2), (6, 2, 2)), ((6, 4), (6, 4))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_probabilities_of_a_binary_classifier(shapes, dtype):
    logits, y = random(*shapes[0]), labels_of(*shapes[1], classes=2).to(dtype)
    p, labels = probabilities(logits, y)
    flat = logits.reshape(6, -1)
    torch.testing.assert_close(p, torch.stack([1 / (1 + flat.exp()), 1 / (1 + (-flat).exp())], dim=1))
    assert torch.equal(labels, y.reshape(6, -1).long())


@pytest.mark.parametrize(
    ("output", "y"),
    [
        ({"a": torch.zeros(2, 3)}, torch.zeros(2, dtype=torch.long)),
        (torch.zeros(2, 3), (torch.zeros(2),)),
        (torch.zeros(2, 3), torch.zeros(2, 2)),
        (torch.zeros(2, 3), torch.zeros(2)),
    ],
)
def test_no_probabilities_of_other_forms(output, y):
    assert probabilities(output, y) is None


# Disagreement


@given(members=st.integers(1, 6), classes=st.integers(2, 5), sharpness=st.sampled_from([0.0, 0.1, 3.0, 1e4]))
@PROPERTY
def test_disagreement_lies_between_zero_and_the_logarithm_of_the_members(members, classes, sharpness):
    p = torch.softmax(sharpness * random(members, 4, classes, 3), dim=2)
    found = disagreement(p)
    assert found.shape == (4,)
    assert (found >= -ROUNDING).all()
    assert (found <= min(math.log(members), math.log(classes)) + ROUNDING).all()


def test_equal_members_do_not_disagree():
    p = torch.softmax(random(1, 4, 3, 2), dim=2).expand(5, -1, -1, -1)
    torch.testing.assert_close(disagreement(p), torch.zeros(4, dtype=torch.float64), rtol=0, atol=ROUNDING)


def test_members_that_are_sure_of_different_classes_disagree_most():
    p = torch.eye(4, dtype=torch.float64).view(4, 1, 4, 1)
    assert disagreement(p).item() == pytest.approx(math.log(4), abs=ROUNDING)


def test_disagreement_is_the_mean_distance_from_the_mean():
    """Mutual information is also the mean Kullback-Leibler divergence of the members from their mean."""
    p = torch.softmax(2 * random(5, 3, 4, 2), dim=2)
    wanted = torch.zeros(3, dtype=torch.float64)
    for b in range(3):
        for place in range(2):
            for member in range(5):
                one, mean = p[member, b, :, place], p[:, b, :, place].mean(0)
                wanted[b] += (one * (one / mean).log()).sum() / (5 * 2)
    torch.testing.assert_close(disagreement(p), wanted, rtol=0, atol=ROUNDING)


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


def test_one_member_has_nobody_to_disagree_with():
    found = gathered(Classes(), random(1, SAMPLES, CLASSES), labels_of(SAMPLES))
    assert "auroc_of_confidence" in found.statistics()
    assert found.missing == {"auroc_of_disagreement": "its prediction has one member"}


def test_members_that_agree_rank_nothing():
    found = gathered(Classes(), random(1, SAMPLES, CLASSES).expand(MEMBERS, -1, -1), labels_of(SAMPLES))
    assert "auroc_of_disagreement" not in found.statistics()
    assert found.missing == {"auroc_of_disagreement": "its members agree"}


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


def residuals(members, y, batch=13):
    found = Residuals()
    for start in range(0, len(y), batch):
        part = members[:, start : start + batch]
        found.add(part, part.mean(0), y[start : start + batch])
    return found


def loss_of(variance, members, y):
    """Minus twice the mean log-likelihood, but for a constant."""
    total = members.numpy().var(0) + variance
    return np.mean(np.log(total) + (y.numpy() - members.numpy().mean(0)) ** 2 / total)


@pytest.mark.parametrize("noise", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_the_variance_is_the_likeliest(noise, shape):
    members = random(MEMBERS, 300, *shape) * random(1, 300, *shape, seed=3)
    y = members.mean(0) + noise * random(300, *shape, seed=1) + members.std(0) * random(300, *shape, seed=2)
    found = residuals(members, y).variance()
    grid = np.exp(np.linspace(-10, 5, 3001))
    wanted = grid[np.argmin([loss_of(variance, members, y) for variance in grid])]
    # The grid's own step.
    assert found == pytest.approx(wanted, rel=0.006)
    assert all(loss_of(found, members, y) <= loss_of(found * factor, members, y) for factor in (0.99, 1.01))


def test_the_variance_of_one_member_is_the_mean_square():
    members, y = random(1, 300), random(300, seed=1)
    assert residuals(members, y).variance() == pytest.approx(float((y - members[0]).square().mean()), rel=ROUNDING)


def test_the_variance_of_a_simulation_is_found():
    """Residuals N(0, 0.7 + v_i) with v_i from 0.1 to 10."""
    draw = torch.Generator().manual_seed(0)
    spread = torch.linspace(math.log(0.1), math.log(10), 20_000, dtype=torch.float64).exp()
    # Two members at ± sqrt(v) have mean 0 and variance v.
    members = torch.stack([spread.sqrt(), -spread.sqrt()])
    y = torch.randn(20_000, generator=draw, dtype=torch.float64) * (0.7 + spread).sqrt()
    # Its standard error is sqrt(2 / Σ 1/(0.7 + v)²) = 0.012.
    assert residuals(members, y).variance() == pytest.approx(0.7, abs=0.05)


def test_members_that_vary_more_than_they_err_leave_next_to_nothing():
    members, y = 10 * random(MEMBERS, 300), random(300, seed=1)
    y = members.mean(0) + y
    assert residuals(members, y).variance() < 1e-4


def test_without_errors_the_variance_is_small_but_above_zero():
    members = random(1, 300)
    assert residuals(members, members[0].clone()).variance() == pytest.approx(1e-12)
    # A likelihood can then still be had.
    found = figures(gathered(Numbers(), members, members[0].clone(), variance=1e-12))
    assert math.isfinite(found["log_likelihood"])


def test_wide_outputs_are_thinned_evenly():
    """The residual of each number is its place."""
    members, y = torch.zeros(1, 4, 1000), torch.arange(1000.0).expand(4, -1)
    found = residuals(members, y)
    kept = found.parts[0][0]
    assert kept.shape[1] <= Residuals.most_numbers
    assert kept[0].diff().unique().tolist() == [4.0]
    # Every fourth of 0 … 999.
    assert found.variance() == pytest.approx(float(torch.arange(0.0, 1000, 4).square().mean()), rel=1e-6)


def test_no_variance_without_residuals():
    found = Residuals()
    assert found.variance() is None
    found.add(random(2, 5, 3), random(5, 3), random(5, 2))
    assert found.variance() is None


def test_gathering_keeps_no_graph():
    model, x, y = nn.Linear(4, CLASSES).double(), random(SAMPLES, 4), labels_of(SAMPLES)
    members = model(x).expand(MEMBERS, -1, -1)
    found = Gathered(Classes())
    found.add(members, Classes().combine(members), y)
    assert all(isinstance(part, np.ndarray) and part.dtype == np.float64 for parts in found.parts.values() for part in parts)
