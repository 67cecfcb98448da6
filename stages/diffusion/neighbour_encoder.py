"""Attention over what is known of a sample's neighbours."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEIGHBOURS = "neighbours"
HEADS = 4


class NeighbourEncoder(nn.Module):
    """Attention of learned queries over a sample's neighbours (Lee et al., 2019, "Set Transformer", Eq. 9): their order makes
    no difference.

    Args:
        shape: numbers of a neighbour, and neighbours, (C, k).
        dim: width of what it gives.
    """

    def __init__(self, shape: tuple[int, int], dim: int) -> None:
        super().__init__()
        # Normalised by the number, over samples and neighbours.
        self.channels, self._shape = shape[0], tuple(shape)
        # Half as wide: there are k of them to each sample.
        inner = max(1, dim // 2)
        self._heads = HEADS if inner % HEADS == 0 else 1
        self.token = nn.Sequential(nn.Linear(shape[0], inner), nn.SiLU(), nn.Linear(inner, inner))
        self.key_value, self.leave = nn.Linear(inner, 2 * inner), nn.Linear(inner, dim)
        self.query = nn.Parameter(torch.randn(inner) / (inner // self._heads) ** 0.25)

    def forward(self, values: Tensor) -> Tensor:
        """Normalised numbers (B, C·k) to (B, dim)."""
        tokens = self.token(values.view(-1, *self._shape).transpose(1, 2))
        key, value = self.key_value(tokens).unflatten(2, (2, self._heads, -1)).permute(2, 0, 3, 1, 4)
        query = self.query.view(1, self._heads, 1, -1).expand(len(values), -1, -1, -1)
        return self.leave(F.scaled_dot_product_attention(query, key, value).flatten(1))
