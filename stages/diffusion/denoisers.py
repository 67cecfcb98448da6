"""The presets of denoisers: what each is by default, and how one is built from its description."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from stages.diffusion.conditioning import ConditioningEncoder
from stages.diffusion.denoiser import Denoiser, Lengths
from stages.diffusion.encoders import Encoders, make_encoders
from stages.diffusion.factored import FactoredDenoiser
from stages.diffusion.mlp import MlpDenoiser
from stages.diffusion.schedule import EPSILON, X0
from stages.diffusion.unet import UNetDenoiser, UNetPlan
from stages.foundation.errors import SettingsError

AUTO, MLP, FACTORED, VECTOR = "auto", "mlp", "factored", "vector"
PAPER, AUTHORS, SMALL = "paper", "authors", "small"

# What `auto` stands for in each preset of a U-Net. The paper: 128 channels, five downsamplings, attention at each level that
# can bear it, two attention layers in the bottleneck (Sec. 4.3). The authors' LeNet5 configuration: attention at 16 × 16 alone,
# pictures of 128 × 128; their TinyNeRF configuration has width 64 and multipliers 1, 2, 2, 4.
UNETS: dict[str, dict[str, Any]] = {
    PAPER: {"width": 128, "multipliers": [1, 1, 2, 2, 4, 4], "blocks": 2, "attention_max_tokens": 1024, "dropout": 0.0},
    AUTHORS: {"width": 128, "multipliers": [1, 1, 2, 2, 4, 4], "blocks": 2, "attention_max_tokens": 256, "dropout": 0.4},
    SMALL: {"width": 32, "multipliers": [1, 2, 2, 4], "blocks": 1, "attention_max_tokens": 256, "dropout": 0.0},
}
UNET_LR, LR = 1e-4, {MLP: 7e-4, FACTORED: 1.4e-3, VECTOR: 1e-3}
UNET_BATCH, DENSE_BATCH = 128, 256
DENSE_BLOCKS, VECTOR_WIDTH = 3, 256
# Numbers of a delta up to which the MLP is taken: it has the smaller held-out loss at 840, the factored one at 10,080 (LeNet5).
SMALL_DELTA = 4096


def auto_preset(shape: tuple[int, int], *, factors: bool = False) -> str:
    """The preset that `auto` stands for, by the deltas (out, in) alone: the same on every device.

    Output vectors where the store has `factors`. Else the MLP where deltas are small, and the factored one where they are not,
    which grows with out + in instead of out·in; how many there are made no difference (300 to 60,000). Never a U-Net: one takes
    hours on a GPU, and weeks on a CPU.
    """
    if factors:
        return VECTOR
    return MLP if shape[0] * shape[1] <= SMALL_DELTA else FACTORED


def denoised_shape(preset: str, shape: Sequence[int]) -> tuple[int, int]:
    """What the denoiser of deltas (out, in) is shown of them: output vectors (out, 1), or the whole."""
    return (shape[0], 1) if preset == VECTOR else tuple(shape)


def resolve(settings: Mapping[str, Any], shape: tuple[int, int]) -> dict[str, Any]:
    """The settings of `[train-diffusion]`, its preset decided, that shape a denoiser of deltas (out, in), with every `auto`
    decided; those of other presets are left out.

    Raises:
        SettingsError: settings that do not go together.
    """
    preset = settings["preset"]
    unet = UNETS.get(preset)
    if unet is None:
        width = VECTOR_WIDTH if preset == VECTOR else resolve_width(shape[0] * shape[1])
        auto = {"width": width, "blocks": DENSE_BLOCKS, "prediction": X0}
        auto |= {"lr": LR[preset], "batch_size": DENSE_BATCH}
    else:
        halvings = len(_decided(settings, "multipliers", unet["multipliers"])) - 1
        pad = 128 if preset == AUTHORS else 2**halvings
        auto = {**unet, "pad_to": pad, "prediction": EPSILON, "lr": UNET_LR, "batch_size": UNET_BATCH}
    names = [*auto, "rank"] if preset == FACTORED else list(auto)
    found = {name: _decided(settings, name, auto.get(name)) for name in names}
    _check(preset, found)
    return {"preset": preset, **found}


def _decided(settings: Mapping[str, Any], name: str, auto: Any) -> Any:
    return auto if settings[name] == AUTO else settings[name]


def _check(preset: str, found: Mapping[str, Any]) -> None:
    if preset == FACTORED and found["prediction"] == EPSILON:
        raise SettingsError(
            "train-diffusion.prediction = 'epsilon': preset factored answers with matrices of low rank, which noise is not",
            "use x0, or the preset mlp, or a U-Net",
        )
    if preset in UNETS:
        step = 2 ** (len(found["multipliers"]) - 1)
        if found["pad_to"] % step:
            raise SettingsError(
                f"train-diffusion.pad_to = {found['pad_to']}: this U-Net halves {len(found['multipliers']) - 1} times",
                f"take a multiple of {step}, or auto",
            )


def resolve_width(numel: int) -> int:
    """The hidden width `auto` stands for: the multiple of 64 nearest to 4·sqrt(numel), between 128 and 1,024."""
    return min(1024, max(128, 64 * round(math.sqrt(numel) / 16)))


def make_denoiser(
    description: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    modules: Mapping[str, Encoders] | None = None,
) -> Denoiser:
    """Build the denoiser a description (kept beside its weights) stands for.

    Args:
        description: what `resolve` decided, shape, fields (name to width), encoders (field to kind and shape) if any, and
            whether it `lengthens`, as one that is tuned.
        weights: of VGG-11, for encoders that are to begin with them.
        modules: further kinds of encoders, (shape of the field, width) -> module from (B, numbers) to (B, width).

    Raises:
        SettingsError, DataError: encoders that do not fit their fields, or other weights.
    """
    denoiser = _network(description, weights, modules)
    if description.get("lengthens"):
        denoiser.lengths = Lengths(denoiser.encoder.dim)
    return denoiser


def _network(
    description: Mapping[str, Any], weights: Mapping[str, Tensor] | None, modules: Mapping[str, Encoders] | None
) -> Denoiser:
    preset, width, prediction = description["preset"], description["width"], description["prediction"]
    shape, blocks = tuple(description["shape"]), description["blocks"]

    def encoder(dim: int) -> ConditioningEncoder:
        own = make_encoders(description.get("encoders", {}), dim, weights, modules)
        return ConditioningEncoder(description["fields"], dim, own)

    if preset in (MLP, VECTOR):
        return MlpDenoiser(denoised_shape(preset, shape), encoder(width), width, blocks, prediction)
    if preset == FACTORED:
        return FactoredDenoiser(shape, encoder(width), width, blocks, description["rank"], prediction)
    plan = _plan(description)
    return UNetDenoiser(shape, encoder(plan.encoded), plan, prediction)


def _plan(description: Mapping[str, Any]) -> UNetPlan:
    most, authors = description["attention_max_tokens"], description["preset"] == AUTHORS
    return UNetPlan(
        description["width"],
        tuple(description["multipliers"]),
        description["blocks"],
        most,
        most if authors else 0,
        1 if authors else 2,
        description["pad_to"],
        description["dropout"],
        late=authors,
    )
