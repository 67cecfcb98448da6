"""Chooses the method for per-sample weights, and what of a pass can be replayed, by checks on a few samples."""

import copy

import torch
from torch import Tensor, nn

from stages.foundation.trees import Tree, batch_size, leaves, take, tree_map
from stages.per_sample.layer import Layer
from stages.per_sample.prefix import Prefix, Record
from stages.per_sample.weights import Forward, Loop, NotSubstitutable, PerSampleWeights, Substitution, Vmap, plain

# Single and batched products differ by rounding; a wrong path differs by the size of the result itself.
SELF_CHECK_TOLERANCE = 1e-3
EXACT_TOLERANCE = 1e-9
# A replayed prefix is the very numbers that were recorded; what varies is only the order of sums on several threads.
REPLAY_TOLERANCE = 1e-5
# Fewer convolutions than this gain nothing from another memory format.
MANY_CONVOLUTIONS = 4


def choose(model: nn.Module, layer: Layer, forward: Forward, x: Tree) -> tuple[PerSampleWeights, str]:
    """The first of substitution and vmap that equals the loop on the probe batch x (two samples are enough), or the loop.

    Compares outputs and gradients under weights that differ between the samples. Probe samples that give no gradient tell
    nothing; noise is put on them then.

    Returns:
        the method to run the model by, and what is wrong with those before it ("" for substitution).
    """
    loop = Loop(model, layer, forward)
    weights = _different_weights(model, layer, batch_size(x))
    wanted = outputs_and_gradient(loop, x, weights)
    if not wanted[-1].flatten(1).any(1).all():
        x = tree_map(lambda leaf: leaf + torch.randn_like(leaf) if leaf.is_floating_point() else leaf, x)
        wanted = outputs_and_gradient(loop, x, weights)
    reasons: list[str] = []
    for kind in (Substitution, Vmap):
        try:
            method = kind(model, layer, forward)
            found = outputs_and_gradient(method, x, weights)
            if equal(found, wanted, SELF_CHECK_TOLERANCE) or _is_nearer_the_truth(kind, model, layer, forward, x, found):
                return method, "; ".join(reasons)
            reasons.append(f"a self-check on a few samples found {kind.name} to give other results")
        except NotSubstitutable as reason:
            reasons.append(reason.message)
        except Exception as error:
            # Whatever it is that torch cannot do with this model: a slower method can.
            message = getattr(error, "message", str(error)) or type(error).__name__
            reasons.append(f"{kind.name} cannot run the model ({message.splitlines()[0][:160]})")
    return loop, "; ".join(reasons)


def _is_nearer_the_truth(
    kind: type[Substitution] | type[Vmap], model: nn.Module, layer: Layer, forward: Forward, x: Tree, found: tuple[Tensor, ...]
) -> bool:
    """Whether float64 says that it is the loop which is inexact: batches of one may be computed by other kernels."""
    if layer.weight(model).dtype != torch.float32:
        return False
    try:
        double = copy.deepcopy(model).double()
        x = tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, x)
        weights = _different_weights(double, layer, batch_size(x))
        wanted, exact = (outputs_and_gradient(one(double, layer, forward), x, weights) for one in (Loop, kind))
    except Exception:
        # A model that insists on float32, say.
        return False
    return equal(exact, wanted, EXACT_TOLERANCE) and equal(found, wanted, SELF_CHECK_TOLERANCE)


def with_best_format(model: nn.Module, forward: Forward, x: Tree) -> Forward:
    """A plain forward pass, in the memory format that torch's convolutions are faster in: channels last, on a CPU, for networks
    of many convolutions. Only rounding may differ; a model that insists on the usual format gets it."""
    convolutions = sum(isinstance(module, nn.Conv2d) and module.in_channels >= 8 for module in model.modules())
    usual = plain(forward)
    if convolutions < MANY_CONVOLUTIONS or next(iter(leaves(x).values())).device.type != "cpu":
        return usual
    other = plain(forward, channels_last=True)
    try:
        with torch.no_grad():
            same = equal(_flat(other(model, x)), _flat(usual(model, x)), SELF_CHECK_TOLERANCE)
    except Exception:
        return usual
    return other if same else usual


def _different_weights(model: nn.Module, layer: Layer, count: int) -> Tensor:
    weight = layer.weight(model)
    scale = 1 + 0.01 * torch.arange(count, device=weight.device, dtype=weight.dtype)
    return weight * scale.view(-1, *[1] * weight.dim())


def outputs_and_gradient(
    method: PerSampleWeights, x: Tree, weights: Tensor, record: Record | None = None
) -> tuple[Tensor, ...]:
    """Every floating-point output, and the gradient in the weights (G, …) of a sum that each of them enters with the same
    weight, however large it is."""
    leaf = weights.clone().requires_grad_()
    with torch.enable_grad():
        outputs = [part for part in leaves(method(x, leaf, record)).values() if part.is_floating_point()]
        total = sum((part / part.detach().norm().clamp(min=1e-12)).square().sum() for part in outputs)
        asked = isinstance(total, Tensor) and total.requires_grad
        gradient = torch.autograd.grad(total, leaf, allow_unused=True)[0] if asked else None
    return *(part.detach() for part in outputs), torch.zeros_like(weights) if gradient is None else gradient


def equal(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float) -> bool:
    """Whether each tensor differs from its twin by at most `tolerance` of that one's norm."""
    return len(found) == len(wanted) and all(
        got.shape == want.shape and bool((got - want).norm() <= tolerance * (want.norm() + 1e-6))
        for got, want in zip(found, wanted, strict=True)
    )


def find_prefix(method: PerSampleWeights, model: nn.Module, layer: Layer, forward: Forward, x: Tree) -> Prefix | None:
    """The prefix of the layer, if replaying it changes neither the base's output nor two successive gradients.

    Args:
        method: how the model is run.
        x: the probe batch, (B, …).

    Returns:
        None where the prefix has to be computed again in every pass.
    """
    size = 1 if isinstance(method, Loop) else batch_size(x)
    x = take(x, slice(0, size))
    try:
        forward = plain(forward)
        prefix = Prefix.probe(model, layer, lambda batch: forward(model, batch), x)
        if prefix is None:
            return None
        base = forward(model, x)
        output, record = prefix.record(lambda: forward(model, x))
        if record is None or not equal(_flat(output), _flat(base), REPLAY_TOLERANCE):
            return None
        weights = _different_weights(model, layer, size)
        wanted = outputs_and_gradient(method, x, weights)

        def is_right(record: Record) -> bool:
            return equal(outputs_and_gradient(method, x, weights, record), wanted, REPLAY_TOLERANCE)

        if not (is_right(record) and is_right(record)):
            return None
        if isinstance(method, Substitution):
            prefix.spare(record, is_right)
    except Exception:
        # What cannot be recorded is computed again.
        return None
    return prefix


def _flat(output: Tree) -> tuple[Tensor, ...]:
    return tuple(leaf.detach().float() for leaf in leaves(output).values())
