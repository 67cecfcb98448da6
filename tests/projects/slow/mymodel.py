"""The same network, as slow as the environment says."""

import os
import time
from pathlib import Path

from torch import nn

HERE = Path(__file__).parent


def held():
    """Whether as many blocks are done as may be, and nobody has said to go on."""
    most = int(os.environ.get("HELD_AFTER_BLOCKS", "0"))
    return most and len(list(HERE.glob("run/*.wip/blocks/*.json"))) >= most and not (HERE / "go on").exists()


class Net(nn.Sequential):
    def forward(self, x):
        time.sleep(float(os.environ.get("SLOW_FORWARD_S", "0")))
        while held():
            time.sleep(0.005)
        return super().forward(x)


def net(width=6):
    return Net(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))
