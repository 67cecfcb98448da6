"""The U-Nets against diffusers' with the same weights, and attention against the textbook."""

import math

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from networks import make, make_fields, numbers_of, random

from stages.diffusion.denoisers import AUTHORS, PAPER, SMALL


def oracle(denoiser, encoded):
    """diffusers' U-Net with the same weights, that sees the same conditioning."""
    plan, attends = denoiser.plan, denoiser.plan.attends(denoiser.shape)
    found = UNet2DModel(
        in_channels=1,
        out_channels=1,
        flip_sin_to_cos=False,
        down_block_types=["AttnDownBlock2D" if attention else "DownBlock2D" for attention in attends],
        up_block_types=["AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)],
        block_out_channels=[plan.channels * factor for factor in plan.multipliers],
        layers_per_block=plan.blocks,
        downsample_padding=0,
        norm_eps=1e-6,
        attention_head_dim=None,
        class_embed_type="identity",
    )
    last = None
    if plan.bottleneck_attention == 2:
        # diffusers' bottleneck ends with a residual block.
        wide, options = plan.channels * plan.multipliers[-1], {"heads": 1, "eps": 1e-6, "norm_num_groups": 32, "bias": True}
        last = Attention(wide, dim_head=wide, residual_connection=True, _from_deprecated_attn_block=True, **options).double()
        last.load_state_dict(attention_weights("", "", denoiser.bottleneck.last.state_dict()))
        found.mid_block.register_forward_hook(lambda module, args, output: last(output))
    found.double().load_state_dict(translated(denoiser))
    if not plan.late:
        found.time_proj.register_forward_hook(lambda module, args, output: output + encoded)
    labels = encoded if plan.late else torch.zeros(len(encoded), 4 * plan.channels, dtype=encoded.dtype)
    return found.eval(), labels, numbers_of(found) + (numbers_of(last) if last else 0)


def translated(denoiser):
    """Our weights under diffusers' names."""
    state = {name: value for name, value in denoiser.state_dict().items() if not name.startswith("encoder.")}
    found = {}
    found |= linear("embed.0.", "time_embedding.linear_1.", state) | linear("embed.2.", "time_embedding.linear_2.", state)
    found |= linear("enter.", "conv_in.", state) | linear("leave.0.", "conv_norm_out.", state)
    found |= linear("leave.2.", "conv_out.", state)
    for side in ("down", "up"):
        for i, level in enumerate(getattr(denoiser, side)):
            theirs = f"{side}_blocks.{i}."
            for j, attention in enumerate(level.attentions):
                found |= residual_weights(f"{side}.{i}.blocks.{j}.", f"{theirs}resnets.{j}.", state)
                if hasattr(attention, "qkv"):
                    found |= attention_weights(f"{side}.{i}.attentions.{j}.", f"{theirs}attentions.{j}.", state)
            if level.resample is not None:
                found |= linear(f"{side}.{i}.resample.", f"{theirs}{side}samplers.0.conv.", state)
    found |= residual_weights("bottleneck.first.", "mid_block.resnets.0.", state)
    found |= residual_weights("bottleneck.second.", "mid_block.resnets.1.", state)
    return found | attention_weights("bottleneck.attention.", "mid_block.attentions.0.", state)


def linear(ours, theirs, state):
    return {f"{theirs}{kind}": state[f"{ours}{kind}"] for kind in ("weight", "bias")}


def residual_weights(ours, theirs, state):
    names = {"norm1": "norm1", "conv1": "conv1", "of_e": "time_emb_proj", "norm2": "norm2", "conv2": "conv2"}
    if f"{ours}shortcut.weight" in state:
        names["shortcut"] = "conv_shortcut"
    return {
        key: value
        for mine, other in names.items()
        for key, value in linear(f"{ours}{mine}.", f"{theirs}{other}.", state).items()
    }


def attention_weights(ours, theirs, state):
    found = linear(f"{ours}norm.", f"{theirs}group_norm.", state) | linear(f"{ours}leave.", f"{theirs}to_out.0.", state)
    for kind in ("weight", "bias"):
        for name, part in zip("qkv", state[f"{ours}qkv.{kind}"].chunk(3), strict=True):
            found[f"{theirs}to_{name}.{kind}"] = part
    return found


# Width 64 is the smallest at which all levels have diffusers' 32 groups. The shapes need padding at both sides.
COINCIDING = {
    "authors": (AUTHORS, (30, 17), {"pad_to": 32}),
    "authors, TinyNeRF": (AUTHORS, (31, 17), {"multipliers": [1, 2, 2, 4], "pad_to": 32}),
    "authors, one block": (AUTHORS, (13, 15), {"multipliers": [1, 2], "blocks": 1, "pad_to": 16}),
    "paper": (PAPER, (33, 20), {}),
    "small": (SMALL, (10, 12), {}),
    "no attention but in the bottleneck": (SMALL, (10, 12), {"attention_max_tokens": 0}),
    "one resolution": (SMALL, (3, 5), {"multipliers": [1]}),
}


@pytest.mark.parametrize("name", COINCIDING)
@torch.no_grad()
def test_output_and_size_equal_diffusers(name):
    preset, shape, settings = COINCIDING[name]
    denoiser = make(preset, shape, 0.02, width=64, **settings).double().eval()
    encoded = denoiser.encode({name: value.double() for name, value in make_fields(3).items()})
    assert encoded.abs().mean() > 0.1
    noisy, t = random(3, *shape).double(), torch.tensor([0, 400, 999])
    theirs, labels, parameters = oracle(denoiser, encoded)
    assert numbers_of(denoiser) - numbers_of(denoiser.encoder) == parameters
    height, width = denoiser.plan.padded(shape)
    padded = torch.zeros(3, 1, height, width, dtype=torch.float64)
    padded[:, 0, : shape[0], : shape[1]] = noisy
    wanted = theirs(padded, t, class_labels=labels).sample[:, 0, : shape[0], : shape[1]]
    assert wanted.std() > 0.01
    # Both in float64, through about 50 layers: 1e-14 has been seen. The sines of t are the same float32 numbers in both.
    torch.testing.assert_close(denoiser(noisy, t, encoded), wanted, rtol=1e-9, atol=1e-11)
    # Conditioning counts: without it the answer is another one.
    other = denoiser(noisy, t, torch.zeros_like(encoded))
    assert (other - wanted).abs().max() > 0.01


def test_diffusers_agrees_with_the_presets_about_attention():
    """That the comparison above is with attention where the paper's and the authors' code have it."""
    found = {
        name: make(preset, shape, **settings).plan.attends(shape) for name, (preset, shape, settings) in COINCIDING.items()
    }
    assert found["authors"] == [False, True, False, False, False, False]
    assert found["authors, TinyNeRF"] == [False, True, False, False]
    assert found["authors, one block"] == [True, False]
    assert found["paper"] == [False, True, True, True, True, True]
    assert found["small"] == [True, True, True, True]
    assert found["no attention but in the bottleneck"] == [False, False, False, False]


@torch.no_grad()
def test_attention_equals_the_textbook():
    layer = make(SMALL, (3, 5), width=8, multipliers=[1]).bottleneck.attention.double()
    hidden = random(2, 8, 3, 5).double()
    # Group norm by hand: 4 groups of 2 channels.
    groups = hidden.reshape(2, 4, 2 * 15)
    normal = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
    normal = normal.reshape(2, 8, 15) * layer.norm.weight[:, None] + layer.norm.bias[:, None]
    weights, biases = layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3)
    for sample in range(2):
        q, k, v = (weight @ normal[sample] + bias[:, None] for weight, bias in zip(weights, biases, strict=True))
        mixed = torch.zeros(8, 15, dtype=torch.float64)
        for i in range(15):
            scores = torch.stack([q[:, i] @ k[:, j] / math.sqrt(8) for j in range(15)])
            shares = scores.exp() / scores.exp().sum()
            for j in range(15):
                mixed[:, i] += shares[j] * v[:, j]
        wanted = hidden[sample].reshape(8, 15) + layer.leave.weight @ mixed + layer.leave.bias[:, None]
        # float64 throughout.
        torch.testing.assert_close(layer(hidden)[sample].reshape(8, 15), wanted, rtol=1e-10, atol=1e-12)
