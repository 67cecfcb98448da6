"""silu(GroupNorm(h + m)) in fused passes, against the two one after the other; and the U-Net that is made of it."""

import copy

import pytest
import torch
from networks import describe, random
from torch import nn

from stages.diffusion.denoisers import make_denoiser
from stages.diffusion.norm_silu import GroupNorm

SHAPES = [(8, 5, 6), (64, 12, 16), (96, 1, 2)]
FIELDS = {"layer_input": 7, "activation": 5}


@pytest.fixture
def uncompiled():
    """The passes as they are written: compiling takes seconds for each."""
    with torch.compiler.set_stance("force_eager"):
        yield


def both(channels, height, width, dtype, *, more=True):
    """The outputs and gradients of both ways, and those of float64."""
    norm = GroupNorm(channels // 4, channels, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    # The mean is larger than the deviation: squares that cancel would show.
    hidden = (random(3, channels, height, width) + 5).to(dtype, memory_format=torch.channels_last)
    added = random(3, channels, seed=1).to(dtype) if more else None
    grad = random(3, channels, height, width, seed=2).to(dtype)

    def run(norm, *given):
        leaves = [value.detach().clone().requires_grad_() for value in given if value is not None]
        output = norm.silu(*leaves)
        return output, torch.autograd.grad(output, [*leaves, norm.weight, norm.bias], grad.to(output.dtype))

    plain, exact = (
        run(norm, hidden, added),
        run(copy.deepcopy(norm).double(), hidden.double(), None if added is None else added.double()),
    )
    norm.fused = True
    return plain, run(norm, hidden, added), exact


def off(found, exact):
    """‖a − b‖ / ‖b‖ of outputs and of every gradient."""
    pairs = zip([found[0], *found[1]], [exact[0], *exact[1]], strict=True)
    return [float((one.double() - other).norm() / other.norm()) for one, other in pairs]


@pytest.mark.parametrize("more", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_passes_give_what_norm_and_silu_give(uncompiled, shape, more):
    plain, fused, exact = both(*shape, torch.float32, more=more)
    assert max(off(plain, exact)) < 1e-5
    assert max(off(fused, exact)) < 1e-5
    assert fused[0].is_contiguous(memory_format=torch.channels_last)
    assert fused[1][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_half_precision_statistics_are_as_exact_as_before(uncompiled, shape):
    plain, fused, exact = both(*shape, torch.bfloat16)
    # The eight bits of what is read and written; the plain way rounds once more, between the two.
    assert max(off(fused, exact)) < 1.1 * max(*off(plain, exact), 2**-8)
    assert fused[0].dtype == torch.bfloat16


@pytest.mark.slow  # the compiler takes seconds for each of four functions
def test_compiled_passes_give_the_same():
    for shape in SHAPES:
        _, fused, exact = both(*shape, torch.float32)
        assert max(off(fused, exact)) < 1e-5


@pytest.mark.parametrize("preset", ["paper", "authors"])
def test_a_u_net_with_fused_norms_is_the_same_u_net(uncompiled, preset):
    torch.manual_seed(0)
    more = {"pad_to": 16} if preset == "authors" else {}
    denoiser = make_denoiser(describe(preset, (12, 14), FIELDS, width=8, multipliers=[1, 2], dropout=0.0, **more))
    nn.init.normal_(denoiser.leave[-1].weight)
    noisy, t = random(3, 12, 14), torch.tensor([0, 500, 999])
    fields = {name: random(3, width, seed=width) for name, width in FIELDS.items()}

    def run():
        output = denoiser(noisy, t, denoiser.encode(fields))
        return [output, *torch.autograd.grad(output.square().sum(), list(denoiser.parameters()))]

    plain = run()
    denoiser.fuse(True)
    for one, other in zip(run(), plain, strict=True):
        # A norm's groups have no gradient in the mean: what is left there is rounding.
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-4 * float(other.abs().max()) + 1e-4)
    denoiser.fuse(False)
    assert torch.equal(run()[0], plain[0])


def test_a_u_net_in_half_precision_stays_there():
    """From its first convolution to its last, norms and attention included."""
    seen = set()
    denoiser = make_denoiser(describe("paper", (12, 14), FIELDS, width=8, multipliers=[1, 2]))
    for module in denoiser.modules():
        if isinstance(module, GroupNorm):
            module.register_forward_hook(lambda module, given, output: seen.add((given[0].dtype, output.dtype)))
    fields = {name: random(3, width, seed=width) for name, width in FIELDS.items()}
    with torch.autocast("cpu", torch.bfloat16):
        denoiser(random(3, 12, 14), torch.zeros(3, dtype=torch.long), denoiser.encode(fields))
    assert seen == {(torch.bfloat16, torch.bfloat16)}
