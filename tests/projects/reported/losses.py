"""Losses after public reports: those that look across the batch, and those that take the model's own class."""

import torch
import torch.nn.functional as F


def own_logits(output, y):
    logits = output["logits"] if type(output) is dict else output.logits
    return F.cross_entropy(logits, y, reduction="none")


def attributes_alone(output, y):
    """Takes the model's own class, and nothing else."""
    return F.cross_entropy(output.logits, y, reduction="none")


def broadcast(output, y):
    return ((output - y) ** 2).mean(1)


def first_token(output, y):
    return F.cross_entropy(output[:, :, 0], y, reduction="none")


def one_value(output, y):
    return F.cross_entropy(output, y)


def squared(output, y):
    return (output - y) ** 2


def standardised(output, y):
    return (output - (y - y.mean()) / (y.std(unbiased=False) + 1e-6)) ** 2


def weighted(output, y):
    weight = torch.tensor([1.0, 3.0, 9.0], device=y.device)[y]
    return F.cross_entropy(output, y, reduction="none") * weight / weight.sum()


def hardest(output, y):
    losses = F.cross_entropy(output, y, reduction="none")
    return losses * (losses >= losses.topk(max(1, len(y) // 2)).values[-1])


def cox(output, y):
    at_risk = (y[None] >= y[:, None]).float()
    return torch.log((output.exp()[None] * at_risk).sum(1)) - output


def contrastive(output, y):
    alike = output @ output.T / 0.2 - 1e4 * torch.eye(len(output), device=y.device)
    same = (y[:, None] == y[None]).float() - torch.eye(len(output), device=y.device)
    return -(F.log_softmax(alike, 1) * same).sum(1) / same.sum(1).clamp(min=1)


def pinball(output, y):
    quantiles = torch.tensor([0.1, 0.5, 0.9], device=y.device)
    error = y[:, None] - output
    return torch.maximum(quantiles * error, (quantiles - 1) * error).mean(1)
