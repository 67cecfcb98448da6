"""Slow, obvious versions of what the library does fast: the oracles of the tests, in torch, numpy and scipy alone."""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import gaussian_kde


@dataclass(frozen=True)
class OverfitLoop:
    """What `overfit_loop` gives for N samples: deltas (N, out, in), the others (N,)."""

    delta: torch.Tensor
    rho: torch.Tensor
    base_loss: torch.Tensor
    overfit_loss: torch.Tensor
    largest_gradient: torch.Tensor
    steps: torch.Tensor


def overfit_loop(
    model,
    parameter_name,
    loss,
    x,
    y,
    optimizer,
    lr,
    steps,
    *,
    momentum=0.0,
    weight_decay=0.0,
    until_converged=False,
    tolerance=0.1,
    max_steps=100,
):
    """Overfit one parameter on each sample by itself: a fresh copy of the model, a batch of one, torch's own optimizer.

    With `until_converged` a sample stops before a step where the norm of its gradient is at most `tolerance` times its first,
    or the largest entry is below a millionth.
    """
    rule = (until_converged, tolerance, max_steps if until_converged else steps)

    def stepper_of(weight):
        if optimizer == "adam":
            return torch.optim.Adam([weight], lr=lr)
        return torch.optim.SGD([weight], lr=lr, momentum=momentum, weight_decay=weight_decay)

    rows = [one_overfit(model, parameter_name, loss, one_sample(x, i), y[i : i + 1], stepper_of, *rule) for i in range(len(y))]
    return OverfitLoop(*(torch.stack(column) for column in zip(*rows, strict=True)))


def one_overfit(model, parameter_name, loss, x, y, stepper_of, until_converged, tolerance, most):
    """The fields of `OverfitLoop` for one sample, a batch of one."""
    net = copy.deepcopy(model).eval().requires_grad_(False)
    weight = net.get_parameter(parameter_name).requires_grad_(True)
    start, stepper = weight.detach().clone(), stepper_of(weight)
    base_loss = loss(net(copied(x)), y).sum().detach()
    largest, first, taken = torch.zeros(()), None, 0
    for _ in range(most):
        stepper.zero_grad()
        loss(net(copied(x)), y).sum().backward()
        peak, norm = weight.grad.abs().max(), weight.grad.norm()
        largest = torch.maximum(largest, peak.float())
        first = norm if first is None else first
        if until_converged and (norm <= tolerance * first or peak < 1e-6):
            break
        stepper.step()
        taken += 1
    # Before another pass, which may change the weight in place.
    delta = (weight.detach() - start).flatten(1)
    overfit_loss = loss(net(copied(x)), y).sum().detach()
    return delta, delta.square().sum().sqrt(), base_loss, overfit_loss, largest, torch.tensor(taken)


def copied(x):
    """A copy of a batch of one, for models that work in place on their input."""
    return one_sample(x, 0)


def one_sample(x, i):
    """Sample i of a batch, as a batch of one: of a tensor, or of each tensor in a tuple or dict.

    A copy, for models that work in place on their input.
    """
    if isinstance(x, dict):
        return {key: one_sample(value, i) for key, value in x.items()}
    if isinstance(x, tuple):
        return tuple(one_sample(value, i) for value in x)
    return x[i : i + 1].clone()


def predict_loop(model, parameter_name, x, deltas):
    """Each member's output for each sample, a copy of the model for each: deltas (N, E, out, in) to (N, E, …)."""
    rows = []
    for i in range(len(deltas)):
        for delta in deltas[i]:
            net = copy.deepcopy(model).eval().requires_grad_(False)
            weight = net.get_parameter(parameter_name)
            weight += delta.view(weight.shape)
            rows.append(net(one_sample(x, i))[0])
    return torch.stack(rows).unflatten(0, deltas.shape[:2])


def linear_schedule(first, last, steps):
    """β_1 … β_T on a straight line, and ᾱ_t = (1 − β_1) … (1 − β_t) (Ho et al., 2020, Sec. 2 and 4), as lists of floats."""
    betas = [first + (last - first) * i / (steps - 1) for i in range(steps)]
    alpha_bar, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        alpha_bar.append(product)
    return betas, alpha_bar


def q_sample(x0, alpha_bar_t, noise):
    """x_t = sqrt(ᾱ_t) x_0 + sqrt(1 − ᾱ_t) ε (Ho et al., 2020, Eq. 4)."""
    return alpha_bar_t**0.5 * x0 + (1 - alpha_bar_t) ** 0.5 * noise


def epsilon_of(x0, x_t, alpha_bar_t):
    """The ε for which `q_sample` leads from x_0 to x_t."""
    return (x_t - alpha_bar_t**0.5 * x0) / (1 - alpha_bar_t) ** 0.5


def ddim_step(x_t, epsilon, alpha_bar_t, alpha_bar_s):
    """x_s = sqrt(ᾱ_s) · "predicted x_0" + sqrt(1 − ᾱ_s) · ε (Song et al., 2020, Eq. 12 with σ = 0)."""
    predicted_x0 = (x_t - (1 - alpha_bar_t) ** 0.5 * epsilon) / alpha_bar_t**0.5
    return alpha_bar_s**0.5 * predicted_x0 + (1 - alpha_bar_s) ** 0.5 * epsilon


def ddpm_step(x_t, epsilon, alpha_bar_t, alpha_bar_s, noise):
    """x_s = (x_t − (1 − α)/sqrt(1 − ᾱ_t) ε)/sqrt(α) + sqrt(β̃) z (Ho et al., 2020, Alg. 2, with the β̃ of Eq. 7).

    Where steps are skipped, α is the product of those between, ᾱ_t / ᾱ_s.
    """
    alpha = alpha_bar_t / alpha_bar_s
    mean = (x_t - (1 - alpha) / (1 - alpha_bar_t) ** 0.5 * epsilon) / alpha**0.5
    variance = (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha)
    return mean + variance**0.5 * noise


def kde_entropy(values):
    """−1/n Σ log p̂(x_i) under scipy's Gaussian kernel density with Silverman's bandwidth."""
    density = gaussian_kde(values, bw_method="silverman")
    return -np.mean(np.log(density(values)))


def direct_entropy_score(model, parameter_name, loss, x, y, noise, sigma):
    """Eq. 6 as it reads: for each sample and draw set θ + σ·std(θ)·noise, run that one sample, and take its loss.

    Args:
        noise: (draws, *shape of the parameter).

    Returns:
        losses (draws, S), and each sample's entropy (S,); the score is their sum.
    """
    net = copy.deepcopy(model).eval().requires_grad_(False)
    weight = net.get_parameter(parameter_name)
    theta = weight.clone()
    losses = np.empty((len(noise), len(x)))
    for i in range(len(x)):
        for j in range(len(noise)):
            weight.copy_(theta + sigma * theta.std() * noise[j])
            losses[j, i] = float(loss(net(x[i : i + 1]), y[i : i + 1]).sum())
    return losses, np.array([kde_entropy(column) for column in losses.T])


class ExactDenoiser:
    """The mean of x_0 given x_t where x_0 is one of K known deltas, the k-th with probability prior_k.

    E[x_0 | x_t] = Σ_k w_k d_k with w = softmax(log prior_k − ‖x_t − sqrt(ᾱ_t) d_k‖² / (2 (1 − ᾱ_t))).

    Args:
        deltas: (K, …).
        prior: (K,) or a row of them for each sample, (B, K).
        alpha_bar: (T,).
    """

    def __init__(self, deltas, prior, alpha_bar):
        self.deltas = deltas.double()
        self.log_prior = torch.as_tensor(prior, dtype=torch.float64).log()
        self.alpha_bar = torch.as_tensor(alpha_bar, dtype=torch.float64)

    def __call__(self, noisy, t):
        """x_t (B, …) and t (B,) to (B, …)."""
        signal = self.alpha_bar[t].view(-1, 1)
        x = noisy.flatten(1).double()
        deltas = self.deltas.flatten(1)
        # ‖x − s d‖² term by term, so that nothing of size B·K·d is ever held.
        distance = x.square().sum(1, keepdim=True) - 2 * signal.sqrt() * (x @ deltas.T) + signal * deltas.square().sum(1)
        share = torch.softmax(self.log_prior - distance / (2 * (1 - signal)), dim=1)
        return (share @ deltas).view(noisy.shape).to(noisy.dtype)
