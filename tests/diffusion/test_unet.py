"""The U-Nets: against diffusers' with the same weights, their sizes against the published ones, and what must hold of each."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from learning import FIELDS, SHAPE, check_shares, distances, trained_on_four
from test_networks import check_leaves_zero, check_rows_are_alone, random, shaken

from stages.diffusion.conditioning import ConditioningEncoder
from stages.diffusion.denoisers import AUTHORS, PAPER, SMALL, UNETS, make_denoiser, resolve
from stages.diffusion.schedule import EPSILON, X0
from stages.diffusion.unet import UNetDenoiser, UNetPlan, _Attention
from stages.foundation.config import TrainDiffusionTable
from stages.foundation.errors import SettingsError

WIDTHS = {"layer_input": 7, "activation": 5, "base_output": 3}
ROWS = 5


def describe(preset, shape, fields=WIDTHS, **settings):
    """A U-Net's description as train-diffusion writes it."""
    return {
        **resolve(TrainDiffusionTable(preset=preset, **settings).model_dump(), shape),
        "shape": list(shape),
        "fields": fields,
    }


def make(preset, shape=(5, 7), **settings):
    """A narrow U-Net in which nothing is zero any more."""
    torch.manual_seed(0)
    return shaken(make_denoiser(describe(preset, shape, **{"width": 16, **settings})), 0.02)


def sketch(*args, **named):
    """A U-Net of any size, without memory."""
    with torch.device("meta"):
        return make_denoiser(describe(*args, **named))


def make_fields(rows=ROWS):
    return {name: random(rows, width, seed=i) for i, (name, width) in enumerate(WIDTHS.items())}


def as_double(fields):
    return {name: value.double() for name, value in fields.items()}


def size(network):
    return sum(p.numel() for p in network.parameters())


# Against diffusers


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
        last = Attention(
            plan.channels * plan.multipliers[-1],
            heads=1,
            dim_head=plan.channels * plan.multipliers[-1],
            eps=1e-6,
            norm_num_groups=32,
            residual_connection=True,
            bias=True,
            _from_deprecated_attn_block=True,
        ).double()
        last.load_state_dict(attention_weights("", "", denoiser.bottleneck.last.state_dict()))
        found.mid_block.register_forward_hook(lambda module, args, output: last(output))
    found.double().load_state_dict(translated(denoiser))
    if not plan.late:
        found.time_proj.register_forward_hook(lambda module, args, output: output + encoded)
    labels = encoded if plan.late else torch.zeros(len(encoded), 4 * plan.channels, dtype=encoded.dtype)
    return found.eval(), labels, size(found) + (size(last) if last else 0)


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
                if isinstance(attention, _Attention):
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
    denoiser = make(preset, shape, width=64, **settings).double().eval()
    encoded = denoiser.encode(as_double(make_fields(3)))
    assert encoded.abs().mean() > 0.1
    noisy, t = random(3, *shape).double(), torch.tensor([0, 400, 999])
    theirs, labels, parameters = oracle(denoiser, encoded)
    assert size(denoiser) - size(denoiser.encoder) == parameters
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
        name: make_plan(preset, shape, **settings).attends(shape) for name, (preset, shape, settings) in COINCIDING.items()
    }
    assert found["authors"] == [False, True, False, False, False, False]
    assert found["authors, TinyNeRF"] == [False, True, False, False]
    assert found["authors, one block"] == [True, False]
    assert found["paper"] == [False, True, True, True, True, True]
    assert found["small"] == [True, True, True, True]
    assert found["no attention but in the bottleneck"] == [False, False, False, False]


@torch.no_grad()
def test_attention_equals_the_textbook():
    torch.manual_seed(0)
    layer, hidden = shaken(_Attention(8)).double(), random(2, 8, 3, 5).double()
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


# Sizes


def test_the_authors_networks_have_the_published_sizes():
    """Of LeNet5's fc1 110.1 million, of TinyNeRF's layer 18.5 million; 1 % is for the conditioning's encoders."""
    lenet = sketch(AUTHORS, (84, 120), {"layer_input": 120, "activation": 84, "base_output": 10})
    assert size(lenet) == pytest.approx(110.1e6, rel=0.01)
    fields = {"layer_input": 63, "activation": 128, "base_output": 1000}
    nerf = sketch(AUTHORS, (128, 63), fields, width=64, multipliers=[1, 2, 2, 4])
    assert size(nerf) == pytest.approx(18.5e6, rel=0.01)


def make_plan(preset, shape, **settings):
    return sketch(preset, shape, **settings).plan


def test_the_paper_as_it_reads():
    """128 channels, five downsamplings, attention wherever it is affordable, two attention layers in the bottleneck."""
    denoiser = sketch(PAPER, (84, 120))
    assert denoiser.enter.out_channels == 128
    assert sum(level.resample is not None for level in denoiser.down) == 5
    assert sum(level.resample is not None for level in denoiser.up) == 5
    assert sum(isinstance(module, _Attention) for module in denoiser.bottleneck.modules()) == 2
    # 96 × 128 and its halves.
    tokens = [96 * 128 // 4**level for level in range(6)]
    wanted = [count <= 1024 for count in tokens]
    assert wanted == [False, False, True, True, True, True]
    for levels in (denoiser.down, reversed(denoiser.up)):
        found = [[isinstance(module, _Attention) for module in level.attentions] for level in levels]
        assert [all(one) for one in found] == wanted
        assert [any(one) for one in found] == wanted
    assert [len(level.blocks) for level in denoiser.down] == [2] * 6
    assert [len(level.blocks) for level in denoiser.up] == [3] * 6
    assert [level.blocks[0].conv1.out_channels for level in denoiser.down] == [128, 128, 256, 256, 512, 512]


@pytest.mark.parametrize(("limit", "attends"), [(12288, True), (12287, False)])
def test_attention_ends_exactly_at_its_limit(limit, attends):
    assert make_plan(PAPER, (84, 120), attention_max_tokens=limit).attends((84, 120)) == [attends] + [True] * 5


def test_the_authors_attend_at_16_by_16_alone():
    assert make_plan(AUTHORS, (84, 120)).attends((84, 120)) == [False, False, False, True, False, False]
    denoiser = sketch(AUTHORS, (84, 120))
    assert sum(isinstance(module, _Attention) for module in denoiser.bottleneck.modules()) == 1
    assert {module.p for module in denoiser.modules() if isinstance(module, torch.nn.Dropout)} == {0.4}


SIDES = [(1, 1), (3, 5), (10, 84), (33, 17), (84, 120), (128, 128), (129, 1)]


@pytest.mark.parametrize("shape", SIDES)
def test_padding_is_as_little_as_the_halvings_need(shape):
    for preset, step in ((PAPER, 32), (SMALL, 8), (AUTHORS, 128)):
        found = make_plan(preset, shape).padded(shape)
        for side, padded in zip(shape, found, strict=True):
            assert padded % step == 0
            assert padded - step < side <= padded


def test_padding_that_cannot_be_halved_is_refused():
    table = TrainDiffusionTable(preset=SMALL, pad_to=12).model_dump()
    with pytest.raises(SettingsError) as raised:
        resolve(table, (5, 7))
    assert raised.value.message == "train-diffusion.pad_to = 12: this U-Net halves 3 times"
    assert raised.value.hint == "take a multiple of 8, or auto"


def test_what_auto_stands_for():
    paper = {"width": 128, "multipliers": [1, 1, 2, 2, 4, 4], "blocks": 2, "attention_max_tokens": 1024, "dropout": 0.0}
    shared = {"prediction": EPSILON, "lr": 1e-4, "batch_size": 128}
    wanted = {
        PAPER: paper | {"pad_to": 32},
        AUTHORS: paper | {"pad_to": 128, "attention_max_tokens": 256, "dropout": 0.4},
        SMALL: {
            "width": 32,
            "multipliers": [1, 2, 2, 4],
            "blocks": 1,
            "attention_max_tokens": 256,
            "dropout": 0.0,
            "pad_to": 8,
        },
    }
    for preset in UNETS:
        assert (
            resolve(TrainDiffusionTable(preset=preset).model_dump(), (84, 120)) == {"preset": preset} | wanted[preset] | shared
        )


# What must hold of each


# A bottleneck of more than one position: with one alone, attention's queries and keys would count for nothing.
SHAPES = {PAPER: (5, 40), AUTHORS: (5, 40), SMALL: (5, 10)}
# 40 is padded to 64 = 2⁵·2.
NARROW = {PAPER: {}, AUTHORS: {"pad_to": 32}, SMALL: {}}


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("preset", UNETS)
def test_every_parameter_gets_a_gradient(preset, rows):
    """Of narrow networks with the presets' own multipliers; also each of attention's three parts."""
    shape = SHAPES[preset]
    denoiser, fields = make(preset, shape, **NARROW[preset]).double().train(), as_double(make_fields(rows))
    noise = random(rows, *shape).double()
    torch.manual_seed(0)
    (denoiser(noise, torch.arange(rows) * 200, denoiser.encode(fields)) - noise).square().mean().backward()
    for name, parameter in denoiser.named_parameters():
        parts = 3 if "qkv.weight" in name else 1
        for gradient, value in zip(parameter.grad.chunk(parts), parameter.detach().chunk(parts), strict=True):
            # What cancels out leaves 1e-16 of float64; the smallest real ones seen are of 1e-6.
            assert gradient.norm() > 1e-9 * value.norm(), name


@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_step_and_conditioning_reach_every_level(width):
    """They are added to channels; a norm that takes the mean of each channel would take them out again."""
    denoiser = make(SMALL, (16, 16), width=width).double()
    noisy, t, fields = random(2, 16, 16).double(), torch.tensor([3, 700]), as_double(make_fields(2))
    denoiser(noisy, t, denoiser.encode(fields)).square().mean().backward()
    for name, parameter in denoiser.named_parameters():
        if "of_e.weight" in name:
            # What a norm took out would leave 1e-16 of float64; 1e-3 and more has been seen.
            assert parameter.grad.norm() > 1e-6 * parameter.detach().norm(), name


@pytest.mark.parametrize("preset", UNETS)
def test_a_row_of_a_batch_equals_a_batch_of_one(preset):
    denoiser = make(preset, SHAPES[preset], **NARROW[preset]).eval()
    # Convolutions of batches of other sizes differ in the last bits of numbers of size one; 2e-6 has been seen.
    check_rows_are_alone(denoiser, SHAPES[preset], make_fields(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("preset", UNETS)
@torch.no_grad()
def test_the_answer_depends_on_noise_step_and_every_field(preset):
    shape = SHAPES[preset]
    denoiser, fields = make(preset, shape, **NARROW[preset]).eval(), make_fields()
    noisy, t = random(ROWS, *shape), torch.full((ROWS,), 500)

    def answer(noisy=noisy, t=t, **changed):
        return denoiser(noisy, t, denoiser.encode(fields | changed))

    further = random(ROWS, *shape, seed=9)
    for other in (answer(noisy + further), answer(t=t + 100), *(answer(**{name: fields[name] + 1}) for name in fields)):
        # A thousand times what rounding does.
        assert (other - answer()).abs().amax((1, 2)).min() > 2e-3


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (10, 84), (33, 17)])
@pytest.mark.parametrize("preset", UNETS)
@torch.no_grad()
def test_the_answer_has_the_deltas_shape(preset, shape):
    """Whatever it is padded to, and answers everywhere."""
    denoiser = make(preset, shape, width=8).eval()
    found = denoiser(random(2, *shape), torch.tensor([5, 900]), denoiser.encode(make_fields(2)))
    assert found.shape == (2, *shape)
    assert (found != 0).all()
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("preset", UNETS)
def test_a_new_denoiser_answers_zero_and_learns_to_leave_it(preset):
    """The first step moves the last layer alone, the second all."""
    shape = SHAPES[preset]
    denoiser = make_denoiser(describe(preset, shape, width=16, dropout=0.0, **NARROW[preset]))
    check_leaves_zero(denoiser, shape, make_fields())


@torch.no_grad()
def test_conditioning_enters_before_the_two_layers_and_in_the_authors_code_after():
    for preset, late in ((PAPER, False), (SMALL, False), (AUTHORS, True)):
        denoiser = make(preset)
        assert denoiser.plan.late == late
        assert denoiser.encode(make_fields()).shape == (ROWS, 64 if late else 16)


@torch.no_grad()
def test_dropout_is_the_trainings_alone():
    denoiser, fields, noisy, t = make(AUTHORS), make_fields(), random(ROWS, 5, 7), torch.arange(ROWS)
    encoded = denoiser.encode(fields)
    assert not torch.equal(denoiser.train()(noisy, t, encoded), denoiser(noisy, t, encoded))
    assert torch.equal(denoiser.eval()(noisy, t, encoded), denoiser(noisy, t, encoded))


@torch.no_grad()
def test_it_predicts_x0_as_well():
    denoiser = make(SMALL, prediction=X0)
    assert denoiser.prediction == X0
    assert denoiser(random(2, 5, 7), torch.arange(2), denoiser.encode(make_fields(2))).shape == (2, 5, 7)


# Large layers


@pytest.mark.parametrize("preset", UNETS)
def test_layers_of_768_by_768_pass(preset):
    """On torch's meta device, which checks every shape and takes no memory."""
    denoiser = sketch(preset, (768, 768))
    with torch.device("meta"):
        fields = {name: torch.empty(2, width) for name, width in WIDTHS.items()}
        found = denoiser(torch.empty(2, 768, 768), torch.zeros(2, dtype=torch.long), denoiser.encode(fields))
    assert found.shape == (2, 768, 768)
    tokens = [768 * 768 // 4**level for level in range(len(denoiser.plan.multipliers))]
    assert denoiser.plan.attends((768, 768)) == [
        count == 256 if preset == AUTHORS else count <= denoiser.plan.attention_max_tokens for count in tokens
    ]


@pytest.mark.slow
def test_a_layer_of_768_by_768_trains():
    """A narrow `small`; its bottleneck attends over 96 × 96 positions. Slow for that."""
    denoiser, noise = make(SMALL, (768, 768), width=8), random(1, 768, 768)

    def loss():
        return F.mse_loss(denoiser(noise, torch.tensor([500]), denoiser.encode(make_fields(1))), noise)

    before = loss()
    before.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in denoiser.parameters())
    torch.optim.SGD(denoiser.parameters(), lr=0.05).step()
    with torch.no_grad():
        assert loss() < before


def test_a_plan_by_hand():
    """A U-Net of one resolution and one attention, of the smallest delta."""
    plan = UNetPlan(8, (1,), 1, 0, 0, 1, 1, 0.0)
    denoiser = UNetDenoiser((1, 1), ConditioningEncoder(WIDTHS, plan.encoded), plan, EPSILON)
    assert plan.padded((1, 1)) == (1, 1)
    assert denoiser(random(2, 1, 1), torch.arange(2), denoiser.encode(make_fields(2))).shape == (2, 1, 1)


# Learning


@pytest.mark.slow
@pytest.mark.parametrize("preset", UNETS)
def test_training_comes_near_the_exact_denoiser(preset):
    """And samples are the deltas it was trained on, as often as the conditioning says. Slow: 1,500 steps, a minute and more."""
    torch.manual_seed(0)
    # Two resolutions of 4 × 4 and 2 × 2, attention at both, or in the authors' way at the lower one.
    own = {"pad_to": 4, "attention_max_tokens": 4} if preset == AUTHORS else {}
    settings = {"width": 16, "multipliers": [1, 2], "dropout": 0.0, **own}
    denoiser = trained_on_four(make_denoiser(describe(preset, SHAPE, FIELDS, **settings)), 1500, 128, 2e-3)
    found, blind = distances(denoiser)
    # Seen: 0.013 against 0.076.
    assert found < blind / 4, (found, blind)
    for kind in (0, 1):
        # Seen: 0.06 of the draws; the noise that is left when a network errs at the last steps is what makes them far.
        check_shares(denoiser, kind, far_allowed=0.12)
