"""Random numbers that depend on what they are for, never on what ran before (DESIGN: seed the unit, not the run)."""

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch


def seed_of(*parts: str | int) -> int:
    """A 63-bit seed: the first bytes of blake2b of "part/part/…", the same on every machine and Python."""
    digest = hashlib.blake2b("/".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: str | int) -> torch.Generator:
    """A CPU generator seeded by `parts`; draws are made on the CPU so that every device sees the same numbers."""
    return torch.Generator().manual_seed(seed_of(*parts))


@contextlib.contextmanager
def global_seed(*parts: str | int) -> Iterator[None]:
    """Seed the generators that torch, numpy and Python share, for code that is not ours (a model's initialisation, dropout, the
    augmentation of a data set), and restore them."""
    with shared_generators() as seed:
        seed(*parts)
        yield


@contextlib.contextmanager
def shared_generators() -> Iterator[Callable[..., None]]:
    """A function that seeds those generators by its parts, as often as it is called; they are restored afterwards."""
    # All of them: the one that this run computes on need not be the current one, which each thread has for itself.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    of_mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    of_python, of_numpy = random.getstate(), np.random.get_state()

    def seed(*parts: str | int) -> None:
        number = seed_of(*parts)
        # torch.manual_seed takes the better part of a millisecond: it also notes seeds, with a stack trace each, for devices
        # that are not in use.
        torch.default_generator.manual_seed(number)
        if devices:
            torch.cuda.manual_seed_all(number)
        if of_mps is not None:
            torch.mps.manual_seed(number)
        random.seed(number)
        np.random.seed(number % 2**32)

    with torch.random.fork_rng(devices=devices):
        try:
            yield seed
        finally:
            if of_mps is not None:
                torch.mps.set_rng_state(of_mps)
            random.setstate(of_python)
            np.random.set_state(of_numpy)
