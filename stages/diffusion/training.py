"""One training step after another, every draw from (seed, step), with an averaged copy of the weights."""

import copy
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stages.seeds import generator

EMA_DECAY = 0.9999
CLIP_NORM = 1.0
WARM_UP_STEPS = 100

# Below this many products a step, several threads wait for each other longer than they compute.
SMALL_STEP = 300_000_000

# step -> the loss of that step's batch, a scalar with gradient
StepLoss = Callable[[int], Tensor]


def threads_for(parameters: int, batch_size: int) -> int:
    """CPU threads for training steps of a network made of dense layers: one where the steps are small."""
    return 1 if parameters * batch_size < SMALL_STEP else torch.get_num_threads()


def ema_decay(step: int) -> float:
    """Weight of the past at a step counted from 0, min(0.9999, (1 + n)/(10 + n)): a short run averages over its last tenth."""
    return min(EMA_DECAY, (1 + step) / (10 + step))


def batch_rows(count: int, batch_size: int, step: int, *seed: str | int) -> Tensor:
    """The rows of a step's batch: epochs are seeded permutations, and a batch may straddle two of them.

    Args:
        count: rows to draw from.
        batch_size: rows a step.
        step: counted from 0.
        seed: what the permutations depend on beside the epoch.

    Returns:
        (batch_size,) int, without repeats inside an epoch.
    """
    first = step * batch_size
    parts = []
    while first < (step + 1) * batch_size:
        epoch, offset = divmod(first, count)
        part = _epoch_order(count, epoch, *seed)[offset : offset + (step + 1) * batch_size - first]
        parts.append(part)
        first += len(part)
    return torch.cat(parts)


@functools.lru_cache(maxsize=2)
def _epoch_order(count: int, epoch: int, *seed: str | int) -> Tensor:
    return torch.randperm(count, generator=generator(*seed, "epoch", epoch))


class Trainer:
    """A network in training, whose whole state is its step, its tensors and its optimizer's.

    Args:
        network: trained in place.
        optimizer: over its parameters.
        step_loss: the loss of a step.
        cosine_steps: length of a cosine schedule of the learning rate, None for a constant one.
        average: keep an exponential moving average; without, the averaged network is the network.
        clip: clip the gradient's norm to 1, and warm the learning rate up over the first 100 steps.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        step_loss: StepLoss,
        *,
        cosine_steps: int | None = None,
        average: bool = True,
        clip: bool = True,
    ) -> None:
        self.network, self.optimizer, self.step = network, optimizer, 0
        self._step_loss, self._cosine_steps, self._clip = step_loss, cosine_steps, clip
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self.averaged = copy.deepcopy(network).requires_grad_(False) if average else network

    def advance(self) -> float:
        """Take one step.

        Returns:
            the loss before it; where it is not finite, the step is not taken.
        """
        self.network.train()
        loss = self._step_loss(self.step)
        value = float(loss.detach())
        if not math.isfinite(value):
            return value
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self._clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), CLIP_NORM)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._rate_factor()
        self.optimizer.step()
        self._average()
        self.step += 1
        return value

    def _rate_factor(self) -> float:
        warm = min(1.0, (self.step + 1) / WARM_UP_STEPS) if self._clip else 1.0
        if self._cosine_steps is None:
            return warm
        done = min(1.0, self.step / self._cosine_steps)
        return warm * 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi))))

    @torch.no_grad()
    def _average(self) -> None:
        if self.averaged is self.network:
            return
        decay = ema_decay(self.step)
        for past, now in zip(self.averaged.parameters(), self.network.parameters(), strict=True):
            past.lerp_(now, 1 - decay)
        for past, now in zip(self.averaged.buffers(), self.network.buffers(), strict=True):
            past.copy_(now)

    def state(self) -> dict[str, Tensor]:
        """Every tensor needed to continue, by name."""
        found = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        if self.averaged is not self.network:
            found |= {f"averaged.{name}": value for name, value in self.averaged.named_parameters()}
        for index, entries in self.optimizer.state_dict()["state"].items():
            found |= {
                f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in entries.items() if value is not None
            }
        return {name: value.detach().clone() for name, value in found.items()}

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Continue from `state()` as it was after `step` steps."""
        self.step = step
        self.network.load_state_dict(
            {name.removeprefix("network."): v for name, v in tensors.items() if name.startswith("network.")}
        )
        if self.averaged is not self.network:
            self.averaged.load_state_dict(self.network.state_dict())
            with torch.no_grad():
                for name, value in self.averaged.named_parameters():
                    value.copy_(tensors[f"averaged.{name}"])
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                entries.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({"state": entries, "param_groups": self.optimizer.state_dict()["param_groups"]})
