"""Losses, metrics and the combination of an ensemble, against torch's own and by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from networks import random
from refusals import refusal

from stages.foundation.errors import DataError
from stages.tasks.data import ArrayDataset, Split
from stages.tasks.loader import naming_rows
from stages.tasks.losses import (
    LOSSES,
    accuracy,
    binary_accuracy,
    binary_cross_entropy,
    check_labels,
    cross_entropy,
    huber,
    mae,
    mean_binary_probability,
    mean_output,
    mean_probability,
    mse,
)

REGRESSION = {"mse": (mse, F.mse_loss), "mae": (mae, F.l1_loss), "huber": (huber, F.huber_loss)}


def one_by_one(function, output, y):
    """torch's mean of each sample by itself."""
    return torch.stack([function(output[i : i + 1], y[i : i + 1]) for i in range(len(output))])


@pytest.mark.parametrize("axes", [(), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_cross_entropy_equals_torch(axes, dtype):
    output, y = random(6, 4, *axes), (torch.arange(6 * math.prod(axes)) % 4).view(6, *axes)
    torch.testing.assert_close(cross_entropy(output, y.to(dtype)), one_by_one(F.cross_entropy, output, y))


@pytest.mark.parametrize("axes", [(), (1,), (5,), (2, 3)])
@pytest.mark.parametrize("name", REGRESSION)
def test_regression_losses_equal_torch(name, axes):
    ours, torchs = REGRESSION[name]
    # Errors on both sides of Huber's threshold.
    output, y = 3 * random(6, *axes), random(6, *axes, seed=1)
    found = ours(output, y)
    assert found.shape == (6,)
    torch.testing.assert_close(found, one_by_one(torchs, output, y))


@pytest.mark.parametrize("axes", [(), (1,), (5,)])
def test_binary_cross_entropy_equals_torch(axes):
    output, y = 3 * random(6, *axes), random(6, *axes, seed=1).sigmoid()
    y[0], y[1] = 0, 1
    torch.testing.assert_close(binary_cross_entropy(output, y), one_by_one(F.binary_cross_entropy_with_logits, output, y))
    whole = (y > 0.5).long()
    torch.testing.assert_close(
        binary_cross_entropy(output, whole), one_by_one(F.binary_cross_entropy_with_logits, output, whole.float())
    )


@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_gradients_and_metrics_a_value_for_each_sample(name):
    loss, _, metrics = LOSSES[name]
    y = torch.arange(6) % 2
    output = random(6, 2) if name == "cross_entropy" else random(6)
    leaf = output.clone().requires_grad_()
    loss(leaf, y).sum().backward()
    assert leaf.grad.abs().min() > 0
    assert all(metric(output, y).shape == (6,) for metric in metrics.values())


@pytest.mark.parametrize("loss", [mse, mae, huber, binary_cross_entropy, binary_accuracy])
def test_one_output_per_sample_may_have_an_axis_of_its_own(loss):
    """A model that ends in Linear(…, 1) beside labels (B,): broadcasting them would compare every sample with every other."""
    output, y = random(6), (torch.arange(6) % 2).float()
    torch.testing.assert_close(loss(output.view(6, 1), y), loss(output, y))
    torch.testing.assert_close(loss(output, y.view(6, 1)), loss(output, y))
    torch.testing.assert_close(loss(output.view(6, 1, 1), y), loss(output, y))


# Pictures with their channels last hold as many numbers as pictures with their channels first, elsewhere.
OTHER_ORDERS = [((2, 3, 4, 4), (2, 4, 4, 3)), ((2, 3, 4), (2, 4, 3))]
UNLIKE = [((6, 2), (6,)), ((6, 2), (6, 3)), ((6,), (5,)), ((6, 2), (3, 4)), ((6, 1), (6, 2))]


@pytest.mark.parametrize(("output", "y"), [*UNLIKE, *OTHER_ORDERS])
@pytest.mark.parametrize("loss", [mse, mae, huber, binary_cross_entropy])
def test_shapes_that_do_not_fit(loss, output, y):
    message = f"{loss.__name__}: y of shape {y} does not fit an output of shape {output}"
    assert refusal(DataError, loss, torch.zeros(output), torch.zeros(y))[0] == message


def test_cross_entropy_refuses_labels_that_are_not_class_numbers():
    found, _ = refusal(DataError, cross_entropy, random(4, 3), torch.zeros(4))
    assert found == "cross_entropy needs integer labels, y is float32"
    for output, y in (((4, 3), (4, 3)), ((4, 3), (4, 1)), ((4,), (4,)), ((4, 3), (5,)), ((4, 3, 2), (4,))):
        found, _ = refusal(DataError, cross_entropy, torch.zeros(output), torch.zeros(y, dtype=torch.int64))
        assert found == f"cross_entropy: y of shape {y} does not fit an output of shape {output}"


@pytest.mark.parametrize("label", [3, -1, 1000])
def test_label_out_of_range(label):
    y = torch.tensor([0, 2, label, 7])
    wanted = f"label {label} is out of range: the model has 3 outputs, so labels are 0 … 2"
    assert refusal(DataError, cross_entropy, random(4, 3), y)[0] == wanted
    with pytest.raises(DataError) as caught, naming_rows(Split(ArrayDataset(y, y), name="train.npz"), range(4)):
        check_labels(y, 3)
    assert caught.value.message == f"train.npz: y[2]: {wanted}"


def test_labels_in_range_pass():
    check_labels(torch.tensor([[0, 1], [2, 2]]), 3)
    check_labels(torch.empty(0, dtype=torch.int64), 3)


@pytest.mark.parametrize("label", [-0.5, 1.5, 2.0])
def test_binary_label_out_of_range(label):
    found, _ = refusal(DataError, binary_cross_entropy, random(3), torch.tensor([0.0, 1.0, label]))
    assert found == f"label {label:g} is out of range: binary_cross_entropy needs labels in [0, 1]"


def test_accuracy():
    output = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 2.0]])
    assert accuracy(output, torch.tensor([0, 1, 1])).tolist() == [1, 0, 1]
    # For further axes the share of places that are right.
    assert accuracy(output.T.unsqueeze(0), torch.tensor([[0, 1, 1]])).tolist() == pytest.approx([2 / 3])


def test_binary_accuracy():
    assert binary_accuracy(torch.tensor([2.0, -2.0, 0.1, -0.1]), torch.tensor([1, 1, 0, 0])).tolist() == [1, 0, 0, 1]
    assert binary_accuracy(torch.tensor([[2.0], [-2.0]]), torch.tensor([1, 1])).tolist() == [1, 0]


@pytest.mark.parametrize("axes", [(), (5,)])
def test_mean_probability_is_the_log_of_the_mean_softmax(axes):
    outputs = 3 * random(7, 4, 3, *axes)
    found = mean_probability(outputs)
    torch.testing.assert_close(found, outputs.softmax(2).mean(0).log(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(4, *axes))


def test_mean_probability_of_one_member_is_its_own():
    output = random(1, 4, 3)
    torch.testing.assert_close(mean_probability(output), F.log_softmax(output[0], dim=1))


def test_mean_probability_does_not_underflow():
    """Logits this far apart have probabilities that float32 rounds to zero."""
    outputs = torch.tensor([[[0.0, -500.0]], [[0.0, -400.0]]])
    torch.testing.assert_close(mean_probability(outputs)[0], torch.tensor([0.0, -400 - math.log(2)]))


@pytest.mark.parametrize("axes", [(), (1,), (2, 3)])
def test_mean_binary_probability_is_the_logit_of_the_mean(axes):
    outputs = 3 * random(7, 4, *axes)
    torch.testing.assert_close(mean_binary_probability(outputs), outputs.sigmoid().mean(0).logit(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean_binary_probability(outputs[:1]), outputs[0], rtol=1e-5, atol=1e-6)


def test_mean_binary_probability_does_not_overflow():
    outputs = torch.tensor([[200.0, -200.0], [300.0, -300.0]])
    # Mean of 1 − p: half of e^−200.
    torch.testing.assert_close(mean_binary_probability(outputs), torch.tensor([200 + math.log(2), -200 - math.log(2)]))


def test_mean_output():
    outputs = random(7, 4, 2)
    torch.testing.assert_close(mean_output(outputs), sum(outputs) / 7)


def test_an_ensemble_is_no_worse_than_its_members_on_average():
    """Jensen's inequality, for each loss with its own combination."""
    outputs, y = 3 * random(5, 8, 3), torch.arange(8) % 3
    members = torch.stack([cross_entropy(output, y) for output in outputs]).mean(0)
    assert (cross_entropy(mean_probability(outputs), y) <= members + 1e-6).all()
    outputs, y = 3 * random(5, 8), (torch.arange(8) % 2).float()
    members = torch.stack([binary_cross_entropy(output, y) for output in outputs]).mean(0)
    assert (binary_cross_entropy(mean_binary_probability(outputs), y) <= members + 1e-6).all()
    members = torch.stack([mse(output, y) for output in outputs]).mean(0)
    assert (mse(mean_output(outputs), y) <= members + 1e-6).all()
