"""What is remembered of a tensor's numbers holds for it and its views, until somebody writes."""

import pytest
import torch

from stages.foundation.bounds import are_within, keep_bounds, note_bounds
from stages.tasks.losses import LabelError, binary_cross_entropy, cross_entropy


@pytest.fixture
def labels():
    """Of three classes; they are remembered as if they had been copied to a GPU."""
    y = torch.tensor([0, 2, 1, 2])
    return note_bounds(y, y.clone())


def test_a_view_has_no_other_numbers(labels):
    assert are_within(labels, 0, 2)
    assert are_within(labels[1:3].unsqueeze(1), 0, 2)
    assert not are_within(labels, 0, 1)
    assert not are_within(labels, 1, 2)


@pytest.mark.parametrize("written", [slice(0, 4), slice(1, 2)])
def test_nothing_is_known_of_what_was_written_to(labels, written):
    labels[written] += 1
    assert not are_within(labels, 0, 9)
    assert not are_within(labels[2:], 0, 9)


def test_nothing_is_known_of_a_copy(labels):
    assert not are_within(labels.clone(), 0, 2)


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.bfloat16])
def test_not_every_tensor_is_looked_at(dtype):
    y = torch.ones(3).to(dtype)
    assert not are_within(note_bounds(y, y.clone()), 0, 1)


def test_nothing_is_known_of_numbers_that_are_none():
    y = torch.tensor([0.5, torch.nan])
    assert not are_within(note_bounds(y, y.clone()), 0, 1)


def test_nothing_is_remembered_in_inference_mode():
    with torch.inference_mode():
        y = torch.tensor([0, 1])
        keep_bounds(y, 0, 1)
        assert not are_within(y, 0, 1)


@pytest.mark.parametrize("classes, wrong", [(3, False), (2, True)])
def test_labels_that_are_known_are_refused_as_others(labels, classes, wrong):
    said = []
    for y in (labels, labels.clone(), labels[:2]):
        try:
            cross_entropy(torch.zeros(len(y), classes), y)
        except LabelError as error:
            said.append((error.row, error.message))
    assert said == ([(1, "label 2 is out of range: the model has 2 outputs, so labels are 0 … 1")] * 3 if wrong else [])


def test_a_label_written_after_it_was_found_right_is_refused():
    y = torch.tensor([0.0, 1.0])
    binary_cross_entropy(torch.zeros(2), y)
    y[1] = 2
    with pytest.raises(LabelError, match="label 2 is out of range"):
        binary_cross_entropy(torch.zeros(2), y)
