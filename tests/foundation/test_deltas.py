"""Deltas as matrices and as outer products: the same ones, whatever is made of them."""

import pytest
import torch
from torch import nn

from stages.foundation.deltas import Deltas

GENERATOR = torch.Generator().manual_seed(0)
U, H = torch.randn(5, 3, 4, generator=GENERATOR), torch.randn(5, 6, generator=GENERATOR)
PRODUCTS = Deltas(U, H)
WHOLE = Deltas(torch.einsum("beo,bi->beoi", U, H))


def test_an_outer_product_is_u_times_h():
    assert torch.equal(PRODUCTS.matrices(), WHOLE.matrices())
    assert torch.equal(Deltas(U[:, 0], H).matrices(), WHOLE.matrices()[:, 0])


@pytest.mark.parametrize(
    "change",
    [
        lambda deltas: deltas.member(1),
        lambda deltas: deltas.member(slice(1, 3)),
        lambda deltas: deltas.mean(),
        lambda deltas: deltas.of_samples(torch.tensor([3, 0, 3])),
        lambda deltas: deltas.scaled(torch.tensor([0.0, 1.0, -2.0, 3.0, 0.5])),
        lambda deltas: deltas.member(0).scaled(torch.arange(5.0)),
    ],
    ids=["a member", "members", "mean", "samples", "scaled", "a scaled member"],
)
def test_what_is_made_of_them_is_the_same(change):
    # Sums and products in another order.
    torch.testing.assert_close(change(PRODUCTS).matrices(), change(WHOLE).matrices(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axes", [(5, 6), (5, 1, 6), (10, 6), (5, 2, 3, 6)])
def test_the_shift_is_what_the_matrix_does(axes):
    """Of its own input, of others', and of several rows a sample."""
    seen, deltas = torch.randn(axes, generator=GENERATOR), PRODUCTS.member(2)
    rows = seen.reshape(5, -1, 6)
    wanted = torch.einsum("boi,bri->bro", deltas.matrices(), rows).reshape(*axes[:-1], 4)
    torch.testing.assert_close(deltas.shift(seen), wanted, rtol=1e-5, atol=1e-5)


def test_of_its_own_input_the_shift_is_h_squared_times_u():
    wanted = H.square().sum(1, keepdim=True) * U[:, 0]
    torch.testing.assert_close(PRODUCTS.member(0).shift(H), wanted, rtol=1e-5, atol=1e-5)
    layer = nn.Linear(6, 4)
    outputs = nn.functional.linear(H[1], layer.weight + PRODUCTS.matrices()[1, 0], layer.bias)
    torch.testing.assert_close(outputs, layer(H[1]) + wanted[1], rtol=1e-5, atol=1e-5)
