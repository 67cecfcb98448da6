"""Several processes at one training, each with its share of every batch; torchrun starts them."""

import datetime
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stages.foundation.errors import TryAgainError
from stages.foundation.processes import local_rank, world_size

# A process that waits longer than this for the others takes them for dead. Rank 0 evaluates and writes while they wait.
TIMEOUT_S = 1800.0
RESTART = "run the same torchrun command again: it goes on from the last checkpoint"


class Ranks:
    """This process among those of one training; alone, it shares nothing.

    Attributes:
        rank: 0 leads: it holds the lock, evaluates, writes.
        count: how many there are.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count
        self._begun = False

    @classmethod
    def joined(cls, device_type: str) -> "Ranks":
        """The ranks that torchrun's environment speaks of; the first call meets the others.

        Raises:
            TryAgainError: they do not come.
        """
        if (count := world_size()) == 1:
            return cls()
        if not dist.is_initialized():
            if device_type == "cuda":
                torch.cuda.set_device(local_rank())
                # Otherwise NCCL's watchdog ends the process where another is gone, before there is a word of it.
                os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
            timeout = datetime.timedelta(seconds=float(os.environ.get("OCD_RANKS_TIMEOUT") or TIMEOUT_S))
            try:
                dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timeout)
            except (RuntimeError, ValueError) as error:
                raise TryAgainError(f"the {count} processes did not find each other: {error}", RESTART) from error
        return cls(dist.get_rank(), count)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, size: int) -> slice:
        return slice(size * self.rank // self.count, size * (self.rank + 1) // self.count)

    def reduce(self, network: nn.Module, loss: Tensor) -> Tensor:
        """Sum the gradients of all ranks' shares, in place, and the losses, ().

        Raises:
            TryAgainError: another rank is gone.
        """
        if self.count == 1:
            return loss
        wanted = [p for p in network.parameters() if p.requires_grad]
        has = torch.tensor([p.grad is not None for p in wanted]).to(wanted[0])
        for p in wanted:
            # A share may be empty, where there are more ranks than samples.
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        flat = torch.cat([*(p.grad.flatten() for p in wanted), has, loss.to(wanted[0].dtype).view(1)])
        self._talk(lambda: dist.all_reduce(flat))
        start = 0
        for p in wanted:
            p.grad.copy_(flat[start : start + p.numel()].view_as(p))
            start += p.numel()
        # What no rank has a gradient of is left alone, as by one process: an optimizer counts the steps of the others.
        for p, count in zip(wanted, flat[start:-1].tolist(), strict=True):
            p.grad = p.grad if count else None
        return flat[-1].double()

    def agree(self, value: Any = None) -> Any:
        """What rank 0 says.

        Raises:
            TryAgainError: another rank is gone.
        """
        if self.count == 1:
            return value
        said = [value]
        self._talk(lambda: dist.broadcast_object_list(said, src=0))
        return said[0]

    def agree_to_stop(self, stop: bool) -> bool:
        """Whether rank 0 wants to stop: asked at every step, so it costs as little as may be."""
        if self.count == 1:
            return stop
        flag = torch.tensor([int(stop)], device=f"cuda:{local_rank()}" if dist.get_backend() == "nccl" else "cpu")
        self._talk(lambda: dist.broadcast(flag, src=0))
        return bool(flag.item())

    def _talk(self, exchange: Callable[[], Any]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            raise TryAgainError(f"another process of this training is gone: {str(error).splitlines()[0]}", RESTART) from error

    def begin(self, what: dict[str, Any]) -> None:
        """Rank 0: let the others take part."""
        self._begun = True
        self.agree(what)

    def begun(self) -> dict[str, Any] | None:
        """What rank 0 begins, once it does; None where there is nothing to train."""
        self._begun = True
        return self.agree()

    def leave(self) -> None:
        """End the group. Those who still wait for rank 0 to begin need not."""
        if not self._begun:
            self.agree(None)
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()
