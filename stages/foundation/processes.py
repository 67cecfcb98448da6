"""The cores of this process, and the processes that torchrun started together, as its environment tells of them."""

import os


def cores() -> int:
    """How many CPU cores this process may use: those of the machine, where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def under_torchrun() -> bool:
    """Whether torchrun started this process; clusters set some of these for purposes of their own."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else 1


def local_rank() -> int:
    """The number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if under_torchrun() else 0


def local_count() -> int:
    """How many processes share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if under_torchrun() else 1
