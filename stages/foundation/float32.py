"""How exactly products and convolutions of float32 are computed: TF32, which GPUs may use in their place, and bfloat16 on some
CPUs, are off by about what the self-checks allow.

torch has an older and a newer interface to this, and refuses to answer by the older what was set by the newer. Where there is
the newer one, values are read by that, and set by both, so that either goes on answering.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

TF32, IEEE, UNSET = "tf32", "ieee", "none"


# What has a `fp32_precision` of its own; nothing, in an older torch.
_ON_GPU = [torch.backends.cuda.matmul, *(getattr(torch.backends.cudnn, name, None) for name in ("conv", "rnn"))]
_ON_CPU = [getattr(torch.backends.mkldnn, name, None) for name in ("matmul", "conv", "rnn")]
_ON_GPU, _ON_CPU = ([place for place in places if hasattr(place, "fp32_precision")] for places in (_ON_GPU, _ON_CPU))
_PLACES = (*_ON_GPU, *_ON_CPU)


@dataclass(frozen=True)
class Precision:
    """What is in force.

    Attributes:
        matmul: by the older interface "highest", "high" or "medium"; None where it does not answer.
        cudnn: whether that allows TF32; None likewise.
        values: those of the newer one, in the order of `_PLACES`; empty where torch lacks it.
    """

    matmul: str | None
    cudnn: bool | None
    values: tuple[str, ...]

    @classmethod
    def now(cls) -> "Precision":
        """As it is."""
        matmul, cudnn = None, None
        with _older_interface(), contextlib.suppress(RuntimeError):
            matmul = torch.get_float32_matmul_precision()
        with _older_interface(), contextlib.suppress(RuntimeError):
            cudnn = torch.backends.cudnn.allow_tf32
        return cls(matmul, cudnn, _values(_PLACES))

    def set(self) -> None:
        """Put it in force."""
        with _older_interface():
            # Where the older interface had not answered, it was set to the opposite of the newer one, and is again.
            torch.set_float32_matmul_precision(self.matmul or ("highest" if self.values[0] == TF32 else "high"))
            torch.backends.cudnn.allow_tf32 = self.values[1] != TF32 if self.cudnn is None else self.cudnn
        for place, value in zip(_PLACES, self.values, strict=True):
            if place.fp32_precision != value:
                # What is not set follows a wider setting.
                place.fp32_precision = UNSET
            if place.fp32_precision != value:
                place.fp32_precision = value

    def holds(self) -> bool:
        """Whether it is in force."""
        return _values(_PLACES) == self.values if _PLACES else Precision.now() == self


def _older_interface() -> contextlib.AbstractContextManager[object]:
    """Some versions of torch warn of it."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def _values(places: Sequence[Any]) -> tuple[str, ...]:
    return tuple([place.fp32_precision for place in places])


EXACT = Precision("highest", False, (IEEE,) * len(_PLACES))
# Products and convolutions on a GPU; what a CPU does stays exact.
FAST = Precision("high", True, (TF32,) * len(_ON_GPU) + (IEEE,) * len(_ON_CPU))
_wanted: Precision | None = None


def restore_wanted() -> None:
    """Put back what the library computes by, if code of others has changed it."""
    if _wanted is not None and not _wanted.holds():
        _wanted.set()


@contextlib.contextmanager
def _computing(by: Precision) -> Iterator[None]:
    global _wanted
    before, wanted = Precision.now(), _wanted
    _wanted = by
    try:
        by.set()
        yield
    finally:
        _wanted = wanted
        before.set()


def exact_float32() -> contextlib.AbstractContextManager[None]:
    """Compute as float32 says; what the caller had set, or the environment (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE), is put back."""
    return _computing(EXACT)


def fast_float32() -> contextlib.AbstractContextManager[None]:
    """Let GPUs use TF32, for what need not be exact: the training of our own networks. What was in force is put back."""
    return _computing(FAST)
