"""Switches gradients off, and checks on, while it is imported."""

import torch
from mymodel import Net

torch.set_grad_enabled(False)
torch.autograd.set_detect_anomaly(True)
torch.use_deterministic_algorithms(True)

__all__ = ["Net"]
