"""How the C library gives out memory."""

import ctypes
import os
import sys

# glibc's mallopt: blocks from this size on are mapped from the system, and free memory above the last block is given back.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Keep up to a GiB that was freed for the next tensor.

    glibc maps every large block anew, page by page, which took more than half of the time of a model of large tensors.
    Where the user has settled it, or there is no glibc, nothing is changed.
    """
    settled = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" and not settled else None
    # Before 2.35 so large a threshold is refused; another setting alone would end glibc's own adapting.
    if mallopt is not None and mallopt(M_MMAP_THRESHOLD, KEPT_BYTES):
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
