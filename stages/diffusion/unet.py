"""The U-Net ε_Ω after Ho et al. (2020): a delta as a one-channel picture."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.diffusion.conditioning import ConditioningEncoder, positional_encoding
from stages.diffusion.denoiser import Denoiser
from stages.diffusion.norm_silu import GroupNorm

GROUPS, NORM_EPS = 32, 1e-6
# Positions up to which attention may keep a matrix of all by all.
MOST_SCORES = 1024


@dataclass(frozen=True)
class UNetPlan:
    """How a U-Net is built.

    Attributes:
        channels: of the highest resolution.
        multipliers: of the channels, for each resolution from high to low; between two of them pictures are halved.
        blocks: residual blocks to a resolution on the way down; on the way up there is one more.
        attention_max_tokens: resolutions with more positions have no attention.
        attention_min_tokens: nor have those with fewer.
        bottleneck_attention: attention layers in the bottleneck, 1 or 2.
        pad_to: both sides are padded with zeros to the next multiple.
        dropout: inside the residual blocks.
        late: the conditioning is added to PE(t) after its two layers, as the authors' code does, not before.
    """

    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    attention_max_tokens: int
    attention_min_tokens: int
    bottleneck_attention: int
    pad_to: int
    dropout: float
    late: bool = False

    @property
    def encoded(self) -> int:
        """Numbers of the encoded conditioning."""
        return self.channels * (4 if self.late else 1)

    @property
    def halvings(self) -> int:
        """How often a picture is halved."""
        return len(self.multipliers) - 1

    def padded(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The sides of the picture a delta (out, in) becomes."""
        return tuple(math.ceil(side / self.pad_to) * self.pad_to for side in shape)

    def attends(self, shape: tuple[int, int]) -> list[bool]:
        """Whether each resolution has attention, for deltas of (out, in)."""
        height, width = self.padded(shape)
        tokens = [(height >> level) * (width >> level) for level in range(len(self.multipliers))]
        return [self.attention_min_tokens <= count <= self.attention_max_tokens for count in tokens]


class UNetDenoiser(Denoiser):
    """Residual blocks at each resolution, attention where it is affordable, attention in the bottleneck (Sec. 4.3).

    e = PE(t) + E_i(i_L) + E_a(a_L) + E_o(f_θ(x)) goes through two layers, and into every residual block.

    Args:
        shape: (out, in) of a delta.
        encoder: of the conditioning, to `plan.encoded` numbers.
    """

    def __init__(self, shape: tuple[int, int], encoder: ConditioningEncoder, plan: UNetPlan, prediction: str) -> None:
        super().__init__()
        self.shape, self.encoder, self.prediction, self.plan = tuple(shape), encoder, prediction, plan
        channels, attends = plan.channels, plan.attends(self.shape)
        widths = [channels * factor for factor in plan.multipliers]
        context = 4 * channels
        self.embed = nn.Sequential(nn.Linear(channels, context), nn.SiLU(), nn.Linear(context, context))
        self.enter = nn.Conv2d(1, channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips = [channels]
        for level, width in enumerate(widths):
            last = level == plan.halvings
            self.down.append(_Level(skips[-1], [0] * plan.blocks, width, context, attends[level], plan.dropout))
            self.down[-1].resample = None if last else nn.Conv2d(width, width, 3, stride=2)
            skips += [width] * (plan.blocks + (not last))
        self.bottleneck = _Bottleneck(widths[-1], context, plan)
        before = widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            joined = [skips.pop() for _ in range(plan.blocks + 1)]
            self.up.append(_Level(before, joined, width, context, attends[level], plan.dropout))
            self.up[-1].resample = nn.Conv2d(width, width, 3, padding=1) if level else None
            before = width
        self.leave = nn.Sequential(_norm(before), nn.SiLU(), nn.Conv2d(before, 1, 3, padding=1))
        # Begins by predicting zero, as Ho et al. do.
        nn.init.zeros_(self.leave[-1].weight)
        nn.init.zeros_(self.leave[-1].bias)

    def forward(self, noisy: Tensor, t: Tensor, encoded: Tensor) -> Tensor:
        position = positional_encoding(t, self.plan.channels).to(encoded)
        e = self.embed(position) + encoded if self.plan.late else self.embed(position + encoded)
        rows, columns = self.shape
        height, width = self.plan.padded(self.shape)
        hidden = self.enter(F.pad(noisy.unsqueeze(1), (0, width - columns, 0, height - rows)))
        skips = [hidden]
        for level in self.down:
            for block, attention in level.pairs():
                hidden = attention(block(hidden, e))
                skips.append(hidden)
            if level.resample is not None:
                # Padded at the far sides alone, as Ho et al. do.
                hidden = level.resample(F.pad(hidden, (0, 1, 0, 1)))
                skips.append(hidden)
        hidden = self.bottleneck(hidden, e)
        for level in self.up:
            for block, attention in level.pairs():
                hidden = attention(block(torch.cat([hidden, skips.pop()], dim=1), e))
            if level.resample is not None:
                hidden = level.resample(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))
        norm, _, last = self.leave
        return last(norm.silu(hidden))[:, 0, :rows, :columns]

    def fuse(self, fused: bool) -> None:
        """Have norms fused with what follows them, or not."""
        for module in self.modules():
            if isinstance(module, GroupNorm):
                module.fused = fused


class _Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention or nothing; `joined` are the channels that each block
    gets beside its predecessor's."""

    def __init__(self, before: int, joined: list[int], width: int, context: int, attends: bool, dropout: float) -> None:
        super().__init__()
        inner = [before] + [width] * (len(joined) - 1)
        self.blocks = nn.ModuleList(
            _Residual(given + more, width, context, dropout) for given, more in zip(inner, joined, strict=True)
        )
        self.attentions = nn.ModuleList(_Attention(width) if attends else nn.Identity() for _ in joined)
        self.resample: nn.Module | None = None

    def pairs(self) -> zip:
        """Blocks with what follows them."""
        return zip(self.blocks, self.attentions, strict=True)


class _Bottleneck(nn.Module):
    """Residual block, attention, residual block; and a second attention, as the paper has it."""

    def __init__(self, width: int, context: int, plan: UNetPlan) -> None:
        super().__init__()
        self.first, self.second = (_Residual(width, width, context, plan.dropout) for _ in range(2))
        self.attention = _Attention(width)
        self.last = _Attention(width) if plan.bottleneck_attention == 2 else nn.Identity()

    def forward(self, hidden: Tensor, e: Tensor) -> Tensor:
        return self.last(self.second(self.attention(self.first(hidden, e)), e))


class _Residual(nn.Module):
    """h + conv(dropout(silu(norm(conv(silu(norm(h))) + W silu(e))))), h through a 1×1 convolution where the widths differ."""

    def __init__(self, given: int, width: int, context: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(given), nn.Conv2d(given, width, 3, padding=1)
        self.of_e = nn.Linear(context, width)
        self.norm2, self.dropout, self.conv2 = _norm(width), nn.Dropout(dropout), nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(given, width, 1) if given != width else nn.Identity()

    def forward(self, hidden: Tensor, e: Tensor) -> Tensor:
        inner, more = self.norm1.silu(hidden), self.of_e(F.silu(e))
        if self.norm2.fused:
            # The bias, too, is added on the way.
            inner, more = F.conv2d(inner, self.conv1.weight, padding=1), more + self.conv1.bias
        else:
            inner = self.conv1(inner)
        return self.shortcut(hidden) + self.conv2(self.dropout(self.norm2.silu(inner, more)))


class _Attention(nn.Module):
    """h + W softmax(q kᵀ / sqrt(C)) v over all positions, one head (Vaswani et al., 2017)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.leave = _norm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = self.norm(hidden).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).chunk(3, dim=2)
        if q.dtype == torch.bfloat16 and q.shape[1] <= MOST_SCORES:
            # As fast as the fused kernels, whose heads are narrower, and its gradient is the same each time.
            scores = torch.bmm(q, k.transpose(1, 2)) / q.shape[2] ** 0.5
            mixed = torch.bmm(torch.softmax(scores.float(), dim=2).to(v.dtype), v)
        else:
            mixed = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
        return hidden + self.leave(mixed).transpose(1, 2).reshape(hidden.shape)


def _norm(channels: int) -> GroupNorm:
    # At least two channels to a group: one by itself would lose its mean, and with it what e adds to it.
    return GroupNorm(math.gcd(GROUPS, channels // 2), channels, eps=NORM_EPS)
