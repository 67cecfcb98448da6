"""torch's global state: the usual one while the library computes, the user's default dtype and device while their code runs."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from stages.foundation.float32 import exact_float32, restore_wanted


@dataclass(frozen=True)
class Defaults:
    """What new tensors are made as, unless they are told.

    Attributes:
        dtype: of floating-point tensors.
        device: where.
    """

    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @classmethod
    def now(cls) -> "Defaults":
        """Those in force."""
        return cls(torch.get_default_dtype(), str(torch.get_default_device()))

    def set(self) -> None:
        """Put them in force."""
        if torch.get_default_dtype() != self.dtype:
            torch.set_default_dtype(self.dtype)
        if str(torch.get_default_device()) != self.device:
            torch.set_default_device(None if self.device == "cpu" else self.device)


USUAL = Defaults()
# What the user's modules left when they were imported, or the caller had set.
_theirs = USUAL
_inside = False


def set_theirs(defaults: Defaults) -> None:
    """What the user's code is to find from now on."""
    global _theirs
    _theirs = defaults


def theirs_are_usual() -> bool:
    """Whether the user's code wants nothing else than the library: otherwise no two threads may run, for torch has one default
    for all of them."""
    return _theirs == USUAL


@contextlib.contextmanager
def usual_torch() -> Iterator[None]:
    """Compute with float32 on the CPU by default, exactly, gradients on, and neither anomaly nor deterministic mode; what the
    caller had set is put back."""
    global _inside
    if _inside:
        yield
        return
    before, deterministic = Defaults.now(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    known = _theirs
    if before != USUAL:
        set_theirs(before)
    _inside = True
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autograd.set_detect_anomaly(False), exact_float32():
            _no_checks()
            USUAL.set()
            yield
    finally:
        _inside = False
        if before not in (USUAL, known) and _theirs == before:
            set_theirs(known)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        before.set()


class their_torch(contextlib.AbstractContextManager[None]):
    """Run a piece of the user's code under the defaults that it expects; what it changes of torch's state is put back.

    Entered for every batch, hence the class, which is faster than a generator, and a device is looked at only where it matters.
    """

    def __enter__(self) -> None:
        self._dtype, self._grad = torch.get_default_dtype(), torch.is_grad_enabled()
        self._device = str(torch.get_default_device()) if _theirs.device != "cpu" else "cpu"
        if self._dtype != _theirs.dtype or self._device != _theirs.device:
            _theirs.set()

    def __exit__(self, *_: object) -> None:
        if torch.get_default_dtype() != self._dtype or self._device != _theirs.device:
            Defaults(self._dtype, self._device).set()
        if torch.is_grad_enabled() != self._grad:
            torch.set_grad_enabled(self._grad)
        if _inside:
            _no_checks()
            restore_wanted()


def left_by_import() -> Defaults:
    """What an import has set as defaults; the usual ones are put back, and gradients are on again."""
    left = Defaults.now()
    USUAL.set()
    torch.set_grad_enabled(True)
    _no_checks()
    restore_wanted()
    return left


# Whether deterministic algorithms are wanted, by `repeatable`.
_repeatable = False


def _no_checks() -> None:
    """No anomaly mode, which slows our own passes, and deterministic algorithms only where they are wanted: strictly, as a user
    may have it, they refuse some of what we do."""
    if torch.is_anomaly_enabled():
        torch.autograd.set_detect_anomaly(False)
    now = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if now != (_repeatable, _repeatable):
        torch.use_deterministic_algorithms(_repeatable, warn_only=_repeatable)


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Take torch's deterministic algorithms on a GPU, where some kernels add up in the order in which their parts are ready.
    What has no such algorithm runs as it is, and torch warns of it."""
    global _repeatable
    if device.type != "cuda":
        yield
        return
    fills = torch.utils.deterministic.fill_uninitialized_memory
    # Filling costs time and shows what reads memory that nobody wrote, which is no purpose of ours.
    _repeatable, torch.utils.deterministic.fill_uninitialized_memory = True, False
    try:
        _no_checks()
        yield
    finally:
        _repeatable, torch.utils.deterministic.fill_uninitialized_memory = False, fills
        _no_checks()
