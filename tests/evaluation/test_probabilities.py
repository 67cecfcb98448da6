"""The probabilities that outputs stand for, and how far members disagree."""

import math

import pytest
import torch
from gathering import ROUNDING, labels_of
from hypothesis import given
from hypothesis import strategies as st
from overfitters import random

from stages.evaluation.metrics import disagreement, probabilities


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


@given(members=st.integers(1, 6), classes=st.integers(2, 5), sharpness=st.sampled_from([0.0, 0.1, 3.0, 1e4]))
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
