"""What a manifest says beside the fingerprint: when, where, on what and with which versions a result was made."""

import datetime
import importlib.metadata
import platform

import torch

from stages.run_directory.format import Made


def now() -> str:
    """The time, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def made(started: str, device: torch.device) -> Made:
    """When a result was begun and ended, device, threads and versions."""
    return Made(
        started=started,
        ended=now(),
        device=str(device),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        versions={name: importlib.metadata.version(name) for name in ("torch", "zarr", "numpy")},
    )
