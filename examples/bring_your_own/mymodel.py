"""A model as you may have it already: nothing in it knows of ocd."""

from torch import Tensor, nn


class TumourNet(nn.Module):
    """Thirty measurements of a cell sample to one logit, malignant or benign."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(30, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 30) to logits (B, 1)."""
        return self.head(self.body(x))
