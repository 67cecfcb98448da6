"""One training step after another, every draw from (seed, step), with an averaged copy of the weights."""

import copy
import functools
import math
import time
from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from stages.foundation.memory import on_its_way
from stages.foundation.no_doubles import MPS
from stages.foundation.seeds import generator
from stages.foundation.tensors import load_state, state_tensors
from stages.training.ranks import Ranks

T = TypeVar("T")

EMA_DECAY = 0.9999
CLIP_NORM = 1.0
WARM_UP_STEPS = 100

# Below this many products a step, several threads wait for each other longer than they compute.
SMALL_STEP = 300_000_000

# Waits for a step's loss, which is on its way from the device.
LossUnderWay = Callable[[], float]
# step -> scalars with gradient whose sum is the loss of that step's batch, one for each micro-batch
StepLosses = Callable[[int], Iterator[Tensor]]


def threads_for(operations: int, batch_size: int) -> int:
    """CPU threads for steps of a network that takes so many multiplications a sample: one where the steps are small."""
    return 1 if operations * batch_size < SMALL_STEP else torch.get_num_threads()


def ema_decay(step: int) -> float:
    """Weight of the past at a step counted from 0, min(0.9999, (1 + n)/(10 + n)): a short run averages over its last tenth."""
    return min(EMA_DECAY, (1 + step) / (10 + step))


def batch_rows(count: int, batch_size: int, step: int, *seed: str | int) -> Tensor:
    """The rows of the batch of a step counted from 0, of `count` rows, (batch_size,) int: epochs are permutations seeded by
    `seed` and their number, and a batch may straddle two of them."""
    first, left, parts = step * batch_size, batch_size, []
    while left > 0:
        epoch, offset = divmod(first, count)
        parts.append(_epoch_order(count, epoch, *seed)[offset : offset + left])
        first, left = first + len(parts[-1]), left - len(parts[-1])
    return torch.cat(parts)


@functools.lru_cache(maxsize=2)
def _epoch_order(count: int, epoch: int, *seed: str | int) -> Tensor:
    return torch.randperm(count, generator=generator(*seed, "epoch", epoch))


class Stream(Generic[T]):
    """What each step of a training needs, made in order by an iterator; a step that does not follow opens it anew."""

    def __init__(self, open: Callable[[int], Iterator[T]]) -> None:
        self._open = open
        self._items: Iterator[T] = iter(())
        self._step: int | None = None
        self.waited_seconds = 0.0

    def at(self, step: int) -> T:
        """What the step needs; the last one again, where it is asked for again."""
        if step != self._step:
            if self._step is None or step != self._step + 1:
                self._items = self._open(step)
            # An iterator that has raised gives nothing any more: whoever tries the step again has it opened anew.
            start, self._step = time.perf_counter(), None
            self.last, self._step = next(self._items), step
            self.waited_seconds += time.perf_counter() - start
        return self.last

    def close(self) -> None:
        """End what makes things ready; the next step opens it anew."""
        if isinstance(self._items, Generator):
            self._items.close()
        self._step = None


class Trainer:
    """A network in training, whose whole state is its step, its tensors and its optimizer's.

    Args:
        cosine_steps: length of a cosine schedule of the learning rate, None for a constant one.
        average: keep an exponential moving average; without, the averaged network is the network.
        clip: clip the gradient's norm to 1, and warm the learning rate up over the first 100 steps.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        step_losses: StepLosses,
        *,
        cosine_steps: int | None = None,
        average: bool = True,
        clip: bool = True,
        ranks: Ranks | None = None,
    ) -> None:
        self.network, self.optimizer, self.step = network, optimizer, 0
        self._step_losses, self._cosine_steps, self._clip = step_losses, cosine_steps, clip
        self.ranks = ranks or Ranks()
        self._rates = [group["lr"] for group in optimizer.param_groups]
        # An optimizer's first step makes its moments; where memory runs out meanwhile, some parameters have half of them.
        self._has_moments = False
        self.averaged = copy.deepcopy(network).requires_grad_(False) if average else network

    def advance(self) -> float:
        """Take one step and wait for it.

        Returns:
            the loss before it; where that or the gradient is not finite, the step is not taken.
        """
        return self.start()()

    def start(self) -> LossUnderWay:
        """Take one step; a GPU has it before it when this returns.

        Returns:
            waits for the loss before the step: NaN where the gradient alone is not finite. Such a step changes no weight and no
            moment; on a CPU it is not counted, on a GPU it is, because its loss is not known yet.
        """
        self.network.train()
        while (found := self._tried()) is None:
            # The failure and what it held are gone.
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        loss, taken = found
        if taken:
            self._average()
            self.step += 1
        arriving = on_its_way(loss, loss.device)
        return lambda: float(arriving())

    def _tried(self) -> tuple[Tensor, bool] | None:
        """A step's loss, (), and whether it was taken as far as the host knows; None where it may be tried again."""
        told = False
        try:
            loss = self._gradients()
            # What the others have heard of cannot be done again by one.
            told = self.ranks.count > 1
            return self._stepped(self.ranks.reduce(self.network, loss))
        except Exception as error:
            recovers = getattr(self._step_losses, "recovers", None)
            if told or recovers is None or not recovers(error):
                raise
        if not self._has_moments:
            self.optimizer.state.clear()
        return None

    @property
    def runs_ahead(self) -> bool:
        """Whether steps are begun before their loss is known: the optimizer finds out on the GPU whether to take them."""
        return bool(self.optimizer.defaults.get("fused")) and next(self.network.parameters()).device.type == "cuda"

    def _stepped(self, loss: Tensor) -> tuple[Tensor, bool]:
        """Step by the gradients that there are, of this loss."""
        # Gradients that are not finite would end in every weight; clipping would turn some of them into zeros.
        norm = nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
        loss = torch.where(torch.isfinite(norm) | ~torch.isfinite(loss), loss, math.nan)
        lost = ~torch.isfinite(loss)
        if self.runs_ahead:
            # As torch.amp.GradScaler tells fused optimizers which steps to leave out.
            self.optimizer.grad_scale, self.optimizer.found_inf = None, lost.float()
        elif bool(lost):
            self.optimizer.zero_grad(set_to_none=True)
            return loss, False
        if self._clip:
            nn.utils.clip_grads_with_norm_(self.network.parameters(), CLIP_NORM, norm)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._rate_factor()
        self.optimizer.step()
        self._has_moments = True
        return loss, True

    def _gradients(self) -> Tensor:
        """Leave the gradients of a step's micro-batches, summed, in the network; the sum of their losses, () float64 (mps has
        none)."""
        self.optimizer.zero_grad(set_to_none=True)
        device = next(self.network.parameters()).device
        loss = torch.zeros((), dtype=torch.float32 if device.type == MPS else torch.float64, device=device)
        for part in self._step_losses(self.step):
            loss += part.detach()
            part.backward()
        return loss

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
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.network.parameters()), 1 - decay)
        for past, now in zip(self.averaged.buffers(), self.network.buffers(), strict=True):
            past.copy_(now)

    def state(self) -> dict[str, Tensor]:
        """Every tensor needed to continue, by name: those in use, not copies."""
        found = {f"network.{name}": value for name, value in _state_dict(self.network).items()}
        if self.averaged is not self.network:
            found |= {f"averaged.{name}": value for name, value in self.averaged.named_parameters()}
        for index, entries in self.optimizer.state_dict()["state"].items():
            found |= {
                f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in entries.items() if value is not None
            }
        return {name: value.detach() for name, value in found.items()}

    def snapshot(self) -> dict[str, Tensor]:
        return _state_dict(self.averaged)

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Continue from `state()` as it was after `step` steps."""
        self.step = step
        network = {name.removeprefix("network."): v for name, v in tensors.items() if name.startswith("network.")}
        load_state(self.network, network)
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
        self._has_moments = bool(entries)
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items():
                if value.shape == parameter.shape:
                    # Files hold tensors in the usual memory format; fused steps want the parameter's own.
                    state[name] = torch.empty_like(parameter).copy_(value)


def _state_dict(network: nn.Module) -> dict[str, Tensor]:
    """For a file, which does not take a tensor under two names: all but the first of tied ones are copies."""
    found, places = state_tensors(network), set()
    for name, value in found.items():
        found[name] = value.clone() if value.data_ptr() in places else value
        places.add(value.data_ptr())
    return found
