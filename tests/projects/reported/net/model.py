"""A module of a package that imports its neighbour."""

from torch import nn

from .blocks import Block


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.head = Block(), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.block(x))
