"""Output vectors and neighbours, each beside the way before it in one run: `python tests/benchmarks/vector.py [row …]`.

On MNIST's LeNet5, fc1 of 84×120 overfitted by sgd. Before: the preset `factored` on whole deltas, as the example had it, and
the search over all distances in double precision.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import infer
import tasks
import torch
from common import entry, main, seconds
from train import SAMPLES, begun, collected, stepped

from stages.collect import collect
from stages.foundation.trees import Tree
from stages.run_directory.project import Project
from stages.select_layer import select_layer
from stages.tasks.neighbours import SearchIndex, nearest
from stages.train_base import train_base
from stages.train_diffusion import train_diffusion
from stages.train_scale import train_scale

STEPS, COUNT, ASKED = 4000, 8, 1024
BEFORE = {"preset": "factored", "width": 512, "batch_size": 128, "lr": 0.001}
MS = 1e3


def settings(table: dict[str, Any]) -> dict[str, Any]:
    return {f"train-diffusion.{name}": value for name, value in table.items()}


def vector_train(folder: Path, device: str) -> dict[str, Any]:
    """Seconds that 4,000 steps on deltas take, with output vectors and before."""
    found = {}
    tables = {"vector": {"preset": "vector"}, "before": BEFORE}
    for name, table in tables.items():
        took, steps, _ = stepped(*begun(collected(folder / name, SAMPLES, device, **settings(table))), 20)
        found[name] = round(STEPS * took / steps, 1)
    return entry(found["vector"], 60, at_least=False, before=found["before"], threads=torch.get_num_threads())


def vector_infer(folder: Path, device: str) -> dict[str, Any]:
    """Milliseconds a sample for one draw, and for five, with output vectors and before."""
    found: dict[str, float] = {}
    for name, table in {"vector": {"preset": "vector"}, "before": BEFORE}.items():
        recipe = {"collect.optimizer": "sgd", "collect.lr": 5e-3, **settings(table | {"max_steps": 1})}
        for members in (1, 5):
            place = folder / f"{name}-{members}"
            place.mkdir()
            project = _finished(place, device, recipe | {"infer.ensemble": members})
            _, took = infer.inferred(project, infer.inputs(place, 10 * infer.SAMPLES))
            found[f"{name}, {members}"] = round(MS * took / (10 * infer.SAMPLES), 3)
    return entry(found["vector, 1"], 0.3, at_least=False, milliseconds=found, target_of_five=1.5)


def _finished(folder: Path, device: str, changed: dict[str, Any]) -> Project:
    found = infer.settled(folder, device, changed)
    for stage in (train_base, select_layer, collect, train_diffusion, train_scale):
        stage(found)
    return found


def neighbour_search(folder: Path, device: str) -> dict[str, Any]:
    """Seconds for the eight nearest other pictures of each of 60,000, and the time of the search before, by some of them."""
    x: Tree = tasks.Mnist().arrays()[0][:SAMPLES].flatten(1).to(device)
    own = torch.arange(len(x), device=x.device)
    quick = seconds(lambda: SearchIndex(x).nearest(x, COUNT, torch.stack([own, own], dim=1)))
    blocks = ((start, x[start : start + 4096]) for start in range(0, len(x), 4096))
    slow = seconds(lambda: nearest(x[:ASKED], blocks, COUNT, own=own[:ASKED])) * len(x) / ASKED
    return entry(quick, 90, at_least=False, before=round(slow, 1), pictures=len(x), threads=torch.get_num_threads())


ROWS: dict[str, Callable[[Path, str], dict[str, Any]]] = {
    "vector_train": vector_train,
    "vector_infer": vector_infer,
    "neighbour_search": neighbour_search,
}


if __name__ == "__main__":
    main(__doc__, ROWS)
