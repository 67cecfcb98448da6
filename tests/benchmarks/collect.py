"""Collecting against the plain loop over samples, both in one run: `python tests/benchmarks/collect.py [row …]`.

A ratio is the loop's time per sample over ours: from the first sample read to the finalised store, imports left out. The loop
is the authors' way: a copy of the model, the same optimizer, a batch of one; it makes the numbers that the store holds (delta,
rho, both losses, conditioning) but writes none of them. The faster of one thread and of all cores counts.
"""

import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import entry, main, project, seconds

from stages.collect import Collect, collect
from stages.lifecycle.context import RunContext
from stages.overfitting.collector import writers
from stages.run_directory.folders import folder_of
from stages.run_directory.project import Project
from stages.select_layer import select_layer
from stages.store.delta_store import DeltaStore
from stages.store.reader import StoreReader
from stages.train_base import train_base

ADAM = {"collect.optimizer": "adam", "collect.lr": 5e-4, "collect.steps": 3}
SGD = {"collect.optimizer": "sgd", "collect.lr": 0.1, "collect.steps": 3, "collect.store": "factored"}
ALL = {"collect.split": "all", "train-base.epochs": 1, "train-base.batch_size": 128, "select-layer.draws": 0}


def loop_seconds(stage: Collect, samples: int) -> float:
    """The authors' loop, seconds a sample."""
    name, settings = stage.context.layer.name, stage.settings
    base = copy.deepcopy(stage.context.base)
    batches = [stage.rows.batch([i]) for i in range(samples)]
    batches = [tuple(part.to(stage.context.device) for part in batch) for batch in batches]

    def run(count: int) -> None:
        seen: dict[str, torch.Tensor] = {}
        for x, y in batches[:count]:
            model = copy.deepcopy(base)
            weight = model.get_parameter(name).requires_grad_(True)
            kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.SGD
            optimizer, start = kind([weight], lr=settings.lr), weight.detach().clone()
            handle = model.get_submodule(name.rpartition(".")[0]).register_forward_hook(
                lambda _, given, output: seen.update(layer_input=given[0].detach(), activation=output.detach())
            )
            with torch.no_grad():
                seen["base_output"] = model(x)
                seen["base_loss"] = F.cross_entropy(seen["base_output"], y)
            handle.remove()
            for _ in range(settings.steps):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            with torch.no_grad():
                seen["overfit_loss"] = F.cross_entropy(model(x), y)
                seen["delta"] = weight - start
                seen["rho"] = seen["delta"].norm()

    threads, found = torch.get_num_threads(), []
    for count in {1, threads}:
        torch.set_num_threads(count)
        run(max(1, samples // 10))
        found += [seconds(lambda: run(samples)) / samples for _ in range(2)]
    torch.set_num_threads(threads)
    return min(found)


def prepared(folder: Path, task: str, layer: str, settings: dict[str, Any], device: str) -> Project:
    """A project that only has to collect."""
    found = project(folder, task, {**ALL, "select-layer.layer": layer, **settings}, device)
    train_base(found)
    select_layer(found)
    return found


def collected(found: Project) -> tuple[Collect, float]:
    """Collect, with the data already in memory; the stage and the seconds a sample."""
    stage = Collect(RunContext(found))
    stage.context.splits  # noqa: B018 (the user's own data are loaded before)
    Collect(RunContext(found)).check()  # whatever torch imports when it is first used
    took = seconds(lambda: stage.execute(force=True))
    return stage, took / len(stage.rows)


def against_loop(folder: Path, task: str, layer: str, settings: dict[str, Any], loops: int, device: str) -> dict[str, Any]:
    """The loop's time per sample over ours."""
    found = prepared(folder, task, layer, settings, device)
    before = loop_seconds(Collect(RunContext(found)), loops)
    stage, ours = collected(found)
    loop = min(before, loop_seconds(stage, loops))
    manifest = stage.context.manifest_of("collect")
    return {
        "ratio": loop / ours,
        "loop_ms": round(loop * 1e3, 4),
        "ours_ms": round(ours * 1e3, 5),
        "samples": len(stage.rows),
        "samples_per_second": round(1 / ours, 1),
        "seconds": round(ours * len(stage.rows), 2),
        "method": manifest.summary["method"],
        "batch_size": manifest.execution["batch_size"],
        "threads": manifest.made.threads,
    }


def ratio_row(
    target: float, task: str, layer: str, method: str, settings: dict[str, Any], loops: int
) -> Callable[..., dict[str, Any]]:
    """A row of this kind, which fails where another method runs than it is about."""

    def run(folder: Path, device: str) -> dict[str, Any]:
        found = against_loop(folder, task, layer, settings, loops, device)
        if found["method"] != method:
            raise SystemExit(f"{layer} was overfitted by {found['method']}, expected {method}: {json.dumps(found)}")
        return entry(found.pop("ratio"), target, at_least=True, **found)

    return run


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    cpu = time.process_time()
    wall = seconds(work)
    return wall, time.process_time() - cpu


def store_overhead(folder: Path, device: str) -> dict[str, Any]:
    """Time with the store over the larger of: computing alone, writing alone, CPU seconds of both over the cores."""
    found = prepared(folder, "Mnist", "fc1.weight", {**ADAM, "collect.samples": 20_000}, device)
    cores = torch.get_num_threads()
    _, each = collected(found)
    stage = Collect(RunContext(found))
    torch.set_num_threads(stage.context.manifest_of("collect").made.threads)
    store = stage.store(folder / "alone", "x")
    store.folder.mkdir()
    store.create()
    arrays = next(_blocks(stage, 1))
    blocks = list(range(store.samples // store.rows))

    def compute() -> None:
        write, DeltaStore.write_block = DeltaStore.write_block, lambda *_, **__: None
        try:
            stage.collector.work(
                store, blocks, stage.batch_size(store.rows), writers(stage.settings.writers), False, lambda *_: None
            )
        finally:
            DeltaStore.write_block = write

    def write() -> None:
        with ThreadPoolExecutor(writers(stage.settings.writers)) as pool:
            list(pool.map(lambda block: store.write_block(block, arrays, sums={}, skipped=[]), blocks))

    compute()
    computing, writing = measured(compute), measured(write)
    torch.set_num_threads(cores)
    count = len(blocks) * store.rows
    bounds = {
        "computing_alone_ms": computing[0] / count * 1e3,
        "writing_alone_ms": writing[0] / count * 1e3,
        "cpu_over_cores_ms": (computing[1] + writing[1]) / cores / count * 1e3,
    }
    value = each * 1e3 / max(bounds.values())
    return entry(value, 1.25, at_least=False, with_store_ms=round(each * 1e3, 5), **{k: round(v, 5) for k, v in bounds.items()})


def _blocks(stage: Collect, count: int) -> Iterator[dict[str, np.ndarray]]:
    reader = StoreReader(folder_of(stage.context.project, "collect").path, stage.context.manifest_of("collect").store)
    for block in range(count):
        span = (block * reader.block_samples, (block + 1) * reader.block_samples)
        yield {name: reader.read(name, *span) for name in reader.description.arrays}


def memory_growth(folder: Path, device: str) -> dict[str, Any]:
    """Peak memory beyond the data set's own, 60,000 samples over 6,000; each in a process of its own."""
    prepared(folder, "Mnist", "fc1.weight", ADAM, device)
    command = [sys.executable, __file__, "--peak", str(folder), "--device", device, "--samples"]
    peaks = [float(subprocess.check_output([*command, str(samples)], text=True)) for samples in (6_000, 60_000)]
    return entry(peaks[1] / peaks[0], 1.1, at_least=False, peak_mib=[round(peak / 2**20, 1) for peak in peaks])


def peak(folder: Path, samples: int, device: str) -> None:
    """Print the peak memory of one collection beyond its data."""
    settings = {**ALL, **ADAM, "select-layer.layer": "fc1.weight", "collect.samples": samples}
    stage = Collect(RunContext(project(folder, "Mnist", settings, device)))
    data = stage.context.splits["all"].dataset
    # The peak from here on, not that of loading the data.
    Path("/proc/self/clear_refs").write_text("5")
    stage.execute(force=True)
    own = sum(part.numel() * part.element_size() for part in (data.x, data.y))
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    print(int(line.split()[1]) * 1024 - own)


def time_growth(folder: Path, device: str) -> dict[str, Any]:
    """600,000 tiny samples over 60,000."""
    took = []
    for samples in (60_000, 600_000):
        found = prepared(folder, "Tiny", "2.weight", {**ADAM, "collect.samples": samples}, device)
        took.append(collected(found)[1] * samples)
    return entry(took[1] / took[0], 11, at_least=False, seconds=[round(t, 2) for t in took])


def shuffled_read(folder: Path, device: str) -> dict[str, Any]:
    """Rows per second of reading for training over raw decompression in order."""
    found = prepared(folder, "Mnist", "fc1.weight", {**ADAM, "collect.samples": 20_000}, device)
    collect(found)
    stage = Collect(RunContext(found))
    reader = StoreReader(folder_of(found, "collect").path, stage.context.manifest_of("collect").store)
    names = ["delta", "rho", *reader.field_names()]

    def in_order() -> None:
        for block in range(reader.blocks):
            start = block * reader.block_samples
            for name in names:
                reader.read(name, start, min(len(reader), start + reader.block_samples))

    def shuffled(epoch: int) -> None:
        for _ in reader.shuffled(names, 128, seed=0, epoch=epoch):
            pass

    in_order()
    raw = min(seconds(in_order) for _ in range(2))
    ours = min(seconds(lambda epoch=epoch: shuffled(epoch)) for epoch in range(2))
    return entry(raw / ours, 0.7, at_least=True, rows_per_second=round(len(reader) / ours), raw=round(len(reader) / raw))


ROWS: dict[str, Callable[[Path, str], dict[str, Any]]] = {
    "lenet_adam": ratio_row(20, "Mnist", "fc1.weight", "outer product", ADAM, 300),
    "lenet_sgd_factored": ratio_row(60, "Mnist", "fc1.weight", "outer product", SGD, 300),
    "early_conv": ratio_row(4, "Pictures", "conv1.weight", "substitution", ADAM, 40),
    "late_linear": ratio_row(15, "Pictures", "fc.weight", "outer product", ADAM, 40),
    "store_overhead": store_overhead,
    "memory_growth": memory_growth,
    "time_growth": time_growth,
    "shuffled_read": shuffled_read,
}


if __name__ == "__main__":
    main(__doc__, ROWS, peak=peak)
