"""A record of a batch, divided sample by sample for vmap; and what becomes of it when samples leave the batch."""

import pytest
import torch
from overfitters import EXACT, RECIPES, Custom, equal_to_the_loop, frozen, random, wanted_of
from prefixed import VECTORS, make, nested, parts, record_of

from stages.overfitting.recipe import Recipe

# What each sample has of its own stands in its rows, in the order of the samples.
DIVISIBLE = ["glue", "in place before", "skip in place", "filled", "several calls", "called before and after", "nested"]


@pytest.mark.parametrize("name", DIVISIBLE)
def test_each_samples_part_is_its_own_record(name):
    model, x, _ = make(name)
    found = record_of(model, x).by_sample(len(x))
    for i in range(len(x)):
        wanted = record_of(model, x[i : i + 1]).tensors
        assert len(found) == len(wanted) > 0
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got[i], want, **EXACT)


def test_a_record_that_has_other_rows_than_the_samples_is_not_divided():
    """Also where the first axis happens to be as long as the batch."""
    model, x, _ = make("time first")
    assert record_of(model, x[: x.shape[1]]).by_sample(x.shape[1]) is None


# Models for which the numbers of rows alone do not say whose they are.
UNCLEAR = ["pairs", "numbered", "numbered and called twice", "buffered", "sorted and put back", "trimmed", "rounds", "kept"]
# Samples leave one after another.
EARLY = Recipe("sgd", 0.1, momentum=0.5, until_converged=True, tolerance=0.6, max_steps=15)


@pytest.mark.parametrize("name", UNCLEAR)
def test_results_are_the_loops_when_samples_leave(name):
    model, x, _ = make(name)
    y = random(6, seed=5)
    steps = wanted_of(model, "fc.weight", x, y, EARLY).steps.tolist()
    assert len(set(steps)) > 2, f"samples are to leave at different steps, not {steps}"
    equal_to_the_loop(model, "fc.weight", x, EARLY, y=y)


def test_a_hook_that_keeps_features_for_later():
    """The record of the parent stands for the child, whose hook is then not called."""
    seen = {}
    torch.manual_seed(3)
    model = frozen(Custom(lambda self, x: self.fc(self.outer(x)) + seen["h"], **parts(outer=nested())))
    model.outer[1][0].register_forward_hook(lambda module, args, output: seen.update(h=output))
    equal_to_the_loop(model, "fc.weight", VECTORS, RECIPES["sgd"])
    equal_to_the_loop(model, "fc.weight", VECTORS, EARLY, y=random(6, seed=5))
