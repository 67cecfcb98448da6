"""Changes torch's default dtype while it is imported."""

import torch
from mymodel import Net as Plain

torch.set_default_dtype(torch.float64)


class Net(Plain):
    def forward(self, x):
        return super().forward(x.double() + torch.zeros(4, device=x.device))
