"""The work of inferring: predictions for the rows of a split, block by block, how many at once, and what they score."""

import zipfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.foundation.trees import Tree, as_tree, leaves, take, to_device, tree_map
from stages.per_sample.pass_size import CACHE_BYTES, largest_output, recorded_bytes
from stages.per_sample.runner import Runner
from stages.prediction.personalised import PersonalisedModel, Prediction
from stages.store.predictions import PredictionBlocks
from stages.tasks.data import Split
from stages.tasks.loader import naming_rows
from stages.tasks.protocol import Task
from stages.tasks.scoring import EVALUATION_BATCH, finite, metrics_of

BASE, MEMBERS, OUTPUT, RHO, INDEX = "base_output", "member_output", "output", "rho", "sample_index"
CPU = torch.device("cpu")
LARGEST_PREDICTED = 1024
# Deltas of a batch, all members of it: the sampler goes over them several times a step, which wants them in the cache; the
# denoiser's products want many.
PREDICTED_BYTES, PREDICTED_ON_GPU = 10 << 20, 256 << 20


def array_name(name: str, path: str) -> str:
    """The array of one tensor of a tree: "output", or "output.logits"."""
    return f"{name}.{path}".rstrip(".")


def stored_output(arrays: dict[str, np.ndarray], name: str, like: Tree) -> Tree:
    """One of an answer's outputs as a tree of the form of `like`; None for an entry that the members' combination left out."""
    found = [arrays.get(array_name(name, path)) for path in leaves(like)]
    return as_tree(like, [None if array is None else torch.from_numpy(array) for array in found])


def extract_members(predictions: Path, folder: Path) -> None:
    """Lay the arrays of the members in an answer's file each in a file of its own, of which rows can be read."""
    with zipfile.ZipFile(predictions) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(MEMBERS)])


class Smaller:
    """The members of a smaller ensemble, read from the files that `extract_members` left as they are asked for; `like` is an
    output (1, …)."""

    def __init__(self, folder: Path | None, like: Tree, samples: int) -> None:
        self._like, self._arrays, self.members = like, [], 0
        paths = [folder / f"{array_name(MEMBERS, name)}.npy" for name in leaves(like)] if folder else []
        if not paths or not all(path.is_file() for path in paths):
            return
        arrays = [np.load(path, mmap_mode="r") for path in paths]
        members, shapes = arrays[0].shape[1], [leaf.shape[1:] for leaf in leaves(like).values()]
        if [array.shape for array in arrays] == [(samples, members, *shape) for shape in shapes]:
            self._arrays, self.members = arrays, members

    def take(self, span: range) -> Tree:
        """Their outputs of some inputs, (E, B, …)."""
        rows = [np.array(array[span.start : span.stop]) for array in self._arrays]
        return as_tree(self._like, [torch.from_numpy(value).transpose(0, 1) for value in rows])


@dataclass(frozen=True)
class BlockPredictor:
    """Predicts for the rows of a split, members that are known already aside, and writes them into the blocks of an answer;
    `like` is an output (1, …)."""

    personalised: PersonalisedModel
    inputs: Split
    ensemble: int
    like: Tree
    smaller: Smaller

    def work(self, predictions: PredictionBlocks, blocks: list[int], batch: int, on_progress: Callable[[int], None]) -> None:
        """Predict and write some blocks; `on_progress` is told how many inputs are done. One block is in memory.

        Raises:
            OcdError: faults of the data and the task. Blocks finished before are written.
        """
        done, known = 0, self.smaller.members
        for block in blocks:
            span, chunks, parts = predictions.block_range(block), {}, []
            for start in range(span.start, span.stop, batch):
                rows = range(start, min(span.stop, start + batch))
                x, more = self.inputs.inputs(rows), self.ensemble - known
                found = self.personalised.predict(x, more, rows=list(rows), first_member=known)
                if predictions.keeps_deltas:
                    chunks |= predictions.write_deltas(rows, found.deltas.cpu().numpy())
                parts.append(self._arrays(rows, found))
                done += len(rows)
                on_progress(done)
            arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            predictions.write_block(block, arrays, chunks)

    def _arrays(self, rows: range, found: Prediction) -> dict[str, np.ndarray]:
        """What is kept of a batch, by name, one row an input."""
        members, output, base_output = (to_device(tree, CPU) for tree in (found.members, found.output, found.base_output))
        if self.smaller.members:
            members = tree_map(lambda old, new: torch.cat([old, new]), self.smaller.take(rows), members)
            output = self.personalised.combine(members)
        arrays = {RHO: found.rho.cpu(), INDEX: self.inputs.rows[rows.start : rows.stop]}
        for name, tree in ((BASE, base_output), (OUTPUT, output)):
            arrays |= {array_name(name, path): leaf for path, leaf in leaves(tree).items()}
        arrays |= {array_name(MEMBERS, path): leaf.transpose(0, 1) for path, leaf in leaves(members).items()}
        return {name: value.contiguous().numpy() for name, value in arrays.items()}

    def figures(self, predictions: PredictionBlocks, task: Task) -> dict[str, Any]:
        """The mean predicted ρ, and the means of the task's metrics for base, one draw and ensemble; these are None where there
        are no labels. Predictions are made before this reads them; beside it only checks look at labels, to refuse what
        could not be scored."""
        count, rho, labelled = len(self.inputs), 0.0, self.inputs.labels([0]) is not None
        totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for block in range(predictions.blocks):
            arrays, span = predictions.read(block), predictions.block_range(block)
            rho += float(arrays[RHO].sum(dtype=np.float64))
            for start in range(0, len(span) if labelled else 0, EVALUATION_BATCH):
                self._score(totals, task, arrays, span, slice(start, min(len(span), start + EVALUATION_BATCH)))
        metrics = {row: {name: finite(total / count) for name, total in sums.items()} for row, sums in totals.items()}
        return {"rho": rho / count, "metrics": metrics if labelled else None}

    def _score(
        self, totals: dict[str, dict[str, float]], task: Task, arrays: dict[str, np.ndarray], span: range, part: slice
    ) -> None:
        """Add some rows to the sums."""
        positions = span[part]
        y = self.inputs.labels(positions)

        def tree(name: str) -> Tree:
            return take(stored_output(arrays, name, self.like), part)

        outputs = {
            "base": tree(BASE),
            "ocd one draw": tree_map(lambda leaf: leaf[:, 0].contiguous(), tree(MEMBERS)),
            "ocd ensemble": tree(OUTPUT),
        }
        for row, output in outputs.items():
            with naming_rows(self.inputs, positions):
                figures = metrics_of(task, output, y)
            for name, values in figures.items():
                totals[row][name] += float(values.double().sum())


def prediction_bytes(runner: Runner, x: Tree) -> int:
    """Memory that a sample of x takes while its members are predicted, without its deltas: the prefix's record, and the largest
    outputs."""
    return recorded_bytes(runner.first_pass(x).record, x) + 2 * largest_output(runner.model, runner.forward, x)


def prediction_batch(sample: int, numel: int, members: int, device: torch.device) -> int:
    """Samples (of so many bytes, as `prediction_bytes`) to predict at once, with all members of each; `numel` is a delta's."""
    deltas = (PREDICTED_ON_GPU if device.type == "cuda" else PREDICTED_BYTES) // (4 * numel * members)
    most = max(1, min(LARGEST_PREDICTED, deltas, CACHE_BYTES // sample if sample else LARGEST_PREDICTED))
    # Parts of it are chunks of sampled deltas.
    return most // 16 * 16 if most >= 16 else 1 << (most.bit_length() - 1)
