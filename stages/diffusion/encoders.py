"""Encoders of conditioning fields that need more than one linear layer: pictures and sounds (Sec. 4.3)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stages.diffusion.neighbour_encoder import NEIGHBOURS, NeighbourEncoder
from stages.foundation.errors import DataError, SettingsError

LINEAR, PICTURE, SOUND = "linear", "vgg11", "spectrogram"

# Simonyan & Zisserman (2014), configuration A: channels of the convolutions, 0 for a halving by the maximum.
VGG11 = (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0)
SMALLEST = 32
FFT, HOP = 1024, 256


class Vgg11(nn.Sequential):
    """The convolutional part of VGG-11, pictures (B, 3, H, W) to (B, 512, H/32, W/32); its keys are `0.weight` … as those of
    torchvision's `features`."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        before = 3
        for width in VGG11:
            if width == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width
        super().__init__(*layers)


class PictureEncoder(nn.Module):
    """A picture through VGG-11, averaged over positions, and one fully connected layer.

    Args:
        shape: of the field, (H, W), (1, H, W) or (3, H, W); smaller ones are enlarged to 32 × 32.
        dim: width of what it gives.
        weights: VGG-11's tensors, which then stay as they are; without, it is trained with the rest.

    Raises:
        SettingsError: the field is no picture.
        DataError: the weights are not VGG-11's.
    """

    def __init__(self, shape: tuple[int, ...], dim: int, weights: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.picture = (1, *shape) if len(shape) == 2 else tuple(shape)
        if len(self.picture) != 3 or self.picture[0] not in (1, 3):
            raise SettingsError(
                f"vgg11 encodes pictures of (H, W), (1, H, W) or (3, H, W), this field is {tuple(shape)}",
                "use linear, or let the task's reduce() keep the field a picture",
            )
        self.channels = self.picture[0]
        self.features, self.leave = _vgg11(weights), nn.Linear(512, dim)

    def forward(self, values: Tensor) -> Tensor:
        """Normalised numbers (B, width) to (B, dim)."""
        return self.leave(_seen(self.features, values.view(-1, *self.picture)))


class SoundEncoder(nn.Module):
    """Sounds as log-magnitude spectrograms of 1,024 bins, each channel through the same VGG-11, side by side into one fully
    connected layer (Sec. 5.4).

    Args:
        shape: of the field, (L,) or (channels, L), samples of sound.
        dim: width of what it gives.
        weights: as `PictureEncoder`.

    Raises:
        SettingsError: the field is no sound.
        DataError: the weights are not VGG-11's.
    """

    def __init__(self, shape: tuple[int, ...], dim: int, weights: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.sound = (1, *shape) if len(shape) == 1 else tuple(shape)
        if len(self.sound) != 2 or self.sound[1] < FFT // 2 + 1:
            raise SettingsError(
                f"spectrogram encodes sounds of (L,) or (channels, L) with L > {FFT // 2}, this field is {tuple(shape)}",
                "use linear, or let the task's reduce() keep the field a sound",
            )
        self.channels = self.sound[0]
        self.register_buffer("window", torch.hann_window(FFT), persistent=False)
        self.features, self.leave = _vgg11(weights), nn.Linear(512 * self.channels, dim)

    def forward(self, values: Tensor) -> Tensor:
        """Normalised numbers (B, width) to (B, dim)."""
        sounds = values.view(-1, self.sound[1])
        spectrum = torch.stft(sounds, FFT, HOP, window=self.window, return_complex=True).abs()
        seen = _seen(self.features, (1 + spectrum).log().unsqueeze(1))
        return self.leave(seen.view(len(values), -1))


def _vgg11(weights: Mapping[str, Tensor] | None) -> Vgg11:
    features = Vgg11()
    if weights is None:
        return features
    # torchvision keeps the convolutions under `features`, and a classifier beside them.
    kept = {name.removeprefix("features."): value for name, value in weights.items() if not name.startswith("classifier.")}
    wanted = features.state_dict()
    wrong = [name for name in wanted if name not in kept or kept[name].shape != wanted[name].shape]
    if wrong or len(kept) != len(wanted):
        raise DataError(
            f"the encoder's weights are not VGG-11's: {', '.join(wrong or sorted(set(kept) - set(wanted)))[:200]}",
            "save torchvision's vgg11 as safetensors: keys features.0.weight, features.0.bias, …",
        )
    features.load_state_dict(kept)
    return features.requires_grad_(False)


def _seen(features: Vgg11, pictures: Tensor) -> Tensor:
    """Pictures (B, 1 or 3, H, W) to (B, 512)."""
    sides = [max(SMALLEST, side) for side in pictures.shape[2:]]
    if sides != list(pictures.shape[2:]):
        pictures = nn.functional.interpolate(pictures, sides, mode="bilinear", antialias=False)
    return features(pictures.expand(-1, 3, -1, -1)).mean((2, 3))


# What a field may be encoded by; `neighbours` is no field of the store.
KINDS = {PICTURE: PictureEncoder, SOUND: SoundEncoder}
# (shape of the field, width) -> encoder
Encoders = Callable[[tuple[int, ...], int], nn.Module]


def make_encoders(
    described: Mapping[str, Mapping[str, Any]],
    dim: int,
    weights: Mapping[str, Tensor] | None = None,
    modules: Mapping[str, Encoders] | None = None,
) -> dict[str, nn.Module]:
    """The encoders, to (B, dim), that descriptions {field: {"kind", "shape"}} stand for; `weights` are VGG-11's, `modules` are
    kinds beside ours."""
    made = {}
    for name, entry in described.items():
        kind, shape = entry["kind"], tuple(entry["shape"])
        if kind == NEIGHBOURS:
            made[name] = NeighbourEncoder(shape, dim)
        else:
            made[name] = KINDS[kind](shape, dim, weights) if kind in KINDS else (modules or {})[kind](shape, dim)
    return made
