"""What the benchmarks share: projects in temporary folders, the machine's description, the one JSON object they print."""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from stages.run_directory.project import Project, load_project  # noqa: E402


def machine(device: str) -> dict[str, Any]:
    """Where this ran."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def entry(value: float, target: float, *, at_least: bool, **more: Any) -> dict[str, Any]:
    """A row: its value, what it must reach, and whether it does."""
    return {"value": round(value, 4), "target": target, "met": value >= target if at_least else value <= target, **more}


def seconds(work: Callable[[], object]) -> float:
    """Wall time."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def project(folder: Path, task: str, settings: dict[str, Any], device: str) -> Project:
    """A project whose task is a class of tests/benchmarks/tasks.py."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tasks.py").write_text((HERE / "tasks.py").read_text())
    (folder / "ocd.toml").write_text(f'[task]\nclass = "tasks:{task}"\n')
    return load_project(folder / "ocd.toml", values={"run.device": device, **settings})


def chosen(rows: dict[str, Callable[..., Any]], asked: list[str]) -> list[str]:
    """The rows asked for, by default all."""
    unknown = set(asked) - set(rows)
    if unknown:
        raise SystemExit(f"unknown rows {sorted(unknown)}; known: {', '.join(rows)}")
    return asked or list(rows)


Row = Callable[[Path, str], dict[str, Any]]


def main(
    purpose: str | None,
    rows: dict[str, Row],
    *,
    on_gpu: dict[str, Row] | None = None,
    peak: Callable[[Path, int, str], None] | None = None,
) -> None:
    """Run the rows asked for, each in a folder of its own, and print them.

    `peak` is what a row runs in a process of its own, to see the memory this takes: this script with `--peak` and `--samples`.
    """
    on_gpu = on_gpu or {}
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("rows", nargs="*", help=f"some of {', '.join([*rows, *on_gpu])}; by default all there are here")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--samples", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if peak and given.peak:
        peak(given.peak, given.samples, given.device)
        return
    known = rows | (on_gpu if given.device == "cuda" else {})
    results = {}
    for name in chosen(known, given.rows):
        with tempfile.TemporaryDirectory() as folder:
            results[name] = known[name](Path(folder), given.device)
        print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
    show(results, given.device)


def show(results: dict[str, Any], device: str) -> None:
    """The one object, on stdout."""
    print(json.dumps({"results": results, "machine": machine(device)}, indent=1))
