"""The work of inferring: predictions for the rows of a split, block by block, how many at once, and what they score."""

import contextlib
import math
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.diffusion.sampler import DrawnNoise
from stages.foundation.background import read_ahead
from stages.foundation.files import available_memory
from stages.foundation.memory import AtOnce, free_on_gpu, on_its_way, one_behind
from stages.foundation.torch_state import theirs_are_usual
from stages.foundation.trees import Tree, as_tree, leaves, take, tree_map
from stages.per_sample.pass_size import CACHE_BYTES, largest_output, recorded_bytes
from stages.per_sample.runner import Runner
from stages.prediction.personalised import Predictor
from stages.run_directory.format import ChunkRecord
from stages.store.predictions import PredictionBlocks
from stages.tasks.classes import guesses
from stages.tasks.data import Split
from stages.tasks.loader import naming_rows
from stages.tasks.protocol import Task
from stages.tasks.scoring import EVALUATION_BATCH, finite, metrics_of

BASE, MEMBERS, OUTPUT, RHO, INDEX = "base_output", "member_output", "output", "rho", "sample_index"
DELTAS, CLASS, PROBABILITY = "deltas", "class", "probability"
LARGEST_PREDICTED = 1024
# Deltas of a batch, all members of it: the sampler goes over them several times a step, which wants them in the cache; the
# denoiser's products want many, and a GPU has more to do with them while the noise of the next ones is drawn.
PREDICTED_BYTES, PREDICTED_ON_GPU = 10 << 20, 1 << 30
# Of a GPU's free memory, what a batch may take; of a delta there are so many copies under way. Of the machine's free memory,
# what page-locked draws of one batch may.
GPU_SHARE, COPIES, DRAWS_SHARE = 0.25, 8, 1 / 16


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
class _Ready:
    """Some rows of a block that are about to be predicted: their x, and on a GPU their noise."""

    block: int
    rows: range
    x: Tree
    noise: DrawnNoise | None

    def take(self, part: range) -> "_Ready":
        """Some of them, counted from the first one."""
        rows, span = self.rows[part.start : part.stop], slice(part.start, part.stop)
        members = len(self.noise) // len(self.rows) if self.noise else 0
        noise = self.noise.take(slice(part.start * members, part.stop * members)) if self.noise else None
        return _Ready(self.block, rows, take(self.x, span), noise)


# What a batch gave, on its way to host memory: waits for it, and says of which rows it is.
_UnderWay = Callable[[], tuple[_Ready, dict[str, Tree]]]


class _Writing:
    """Gathers predictions until a block is whole, and deltas until a batch is, and writes them."""

    def __init__(self, predictions: PredictionBlocks, batch: int) -> None:
        self._predictions, self._batch = predictions, batch
        self._parts: list[dict[str, np.ndarray]] = []
        self._deltas: list[np.ndarray] = []
        self._chunks: dict[str, ChunkRecord] = {}

    def add(self, block: int, rows: range, arrays: dict[str, np.ndarray], deltas: np.ndarray | None) -> None:
        """What was predicted of some rows, which follow those before."""
        self._parts.append(arrays)
        if deltas is None:
            return
        self._deltas.append(deltas)
        gathered = sum(map(len, self._deltas))
        # Chunks are parts of whole batches, also where those are predicted in several goes.
        if gathered == self._batch or rows.stop == self._predictions.block_range(block).stop:
            whole = self._deltas[0] if len(self._deltas) == 1 else np.concatenate(self._deltas)
            self._chunks |= self._predictions.write_deltas(range(rows.stop - gathered, rows.stop), whole)
            self._deltas = []

    def finish(self, block: int, rows: range) -> None:
        """Write the block, if these were its last rows."""
        if rows.stop == self._predictions.block_range(block).stop:
            arrays = {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}
            self._predictions.write_block(block, arrays, self._chunks)
            self._parts, self._chunks = [], {}


@dataclass(frozen=True)
class BlockPredictor:
    """Predicts for the rows of a split, members that are known already aside, and writes them into the blocks of an answer;
    `like` is an output (1, …), `form` says what a classifier's outputs are the logits of (see `logits_of`), and `tell` hears of
    smaller batches where memory runs out."""

    predictor: Predictor
    inputs: Split
    ensemble: int
    like: Tree
    smaller: Smaller
    tell: Callable[[str], None] = lambda text: None
    form: str | None = None

    def work(self, predictions: PredictionBlocks, blocks: list[int], batch: int, on_progress: Callable[[int], None]) -> None:
        """Predict and write some blocks; `on_progress` is told how many inputs are done. One block is in memory.

        Raises:
            OcdError: faults of the data and the task. Blocks finished before are written.
        """
        writing, done = _Writing(predictions, batch), 0
        for ready, trees in one_behind(self._found(predictions, blocks, batch), self._device):
            block, rows = ready.block, ready.rows
            writing.add(block, rows, self._arrays(rows, trees), trees[DELTAS].numpy() if DELTAS in trees else None)
            done += len(rows)
            on_progress(done)
            writing.finish(block, rows)

    def _found(self, predictions: PredictionBlocks, blocks: list[int], batch: int) -> Iterator[_UnderWay]:
        """Batches in order, each begun when it is asked for."""
        at_once = AtOnce(batch, tell=lambda left: self.tell(f"memory ran out: from here on {left} inputs at once"))
        all_ready = self._ready(predictions, blocks, batch)
        if self._device.type == "cuda" and theirs_are_usual():
            all_ready = read_ahead(all_ready)
        with contextlib.closing(all_ready):
            for ready in all_ready:

                def start(part: range, ready: _Ready = ready) -> _UnderWay:
                    return self._start(ready.take(part), predictions.keeps_deltas)

                yield from at_once.each(range(len(ready.rows)), start)

    @property
    def _device(self) -> torch.device:
        return self.predictor.device

    @property
    def _members(self) -> range:
        """Those that are not known."""
        return range(self.smaller.members, self.ensemble)

    def _ready(self, predictions: PredictionBlocks, blocks: list[int], batch: int) -> Iterator[_Ready]:
        """For a GPU everything lies in page-locked memory, and noise is drawn, which takes the CPU long."""
        on_gpu = self._device.type == "cuda"
        for block in blocks:
            span = predictions.block_range(block)
            for start in range(span.start, span.stop, batch):
                rows = range(start, min(span.stop, start + batch))
                x, noise = self.inputs.inputs(rows), None
                if on_gpu:
                    x = tree_map(lambda leaf: leaf.pin_memory(), x)
                    noise = self.predictor.drawn(rows, self._members)
                yield _Ready(block, rows, x, noise)

    def _start(self, ready: _Ready, with_deltas: bool) -> _UnderWay:
        """Predict, and let the results come."""
        found = self.predictor.predict(
            ready.x, len(self._members), rows=ready.rows, first_member=self._members.start, noise=ready.noise
        )
        trees = {MEMBERS: found.members, OUTPUT: found.output, BASE: found.base_output}
        if found.rho is not None:
            trees[RHO] = found.rho
        if with_deltas:
            trees[DELTAS] = found.deltas.matrices()
        arriving = on_its_way(trees, self._device)
        return lambda: (ready, arriving())

    def _arrays(self, rows: range, trees: dict[str, Tree]) -> dict[str, np.ndarray]:
        """What is kept of a batch, by name, one row an input."""
        members, output = trees[MEMBERS], trees[OUTPUT]
        if self.smaller.members:
            members = tree_map(lambda old, new: torch.cat([old, new]), self.smaller.take(rows), members)
            output = self.predictor.combine(members)
        arrays = {RHO: trees[RHO]} if RHO in trees else {}
        arrays[INDEX] = self.inputs.rows[rows.start : rows.stop]
        if self.form is not None:
            arrays[CLASS], arrays[PROBABILITY] = guesses(output, self.form)
        for name, tree in ((BASE, trees[BASE]), (OUTPUT, output)):
            arrays |= {array_name(name, path): leaf for path, leaf in leaves(tree).items()}
        arrays |= {array_name(MEMBERS, path): leaf.transpose(0, 1) for path, leaf in leaves(members).items()}
        return {name: value.contiguous().numpy() for name, value in arrays.items()}

    def figures(self, predictions: PredictionBlocks, task: Task, rows: Mapping[str, str]) -> dict[str, Any]:
        """The mean predicted ρ (None where none was), and the means of the task's metrics, None where there are no labels; of
        `rows`, the name of the array that each is scored by. Predictions are made before this reads them; beside it only
        checks look at labels, to refuse what could not be scored."""
        count, rho, labelled = len(self.inputs), 0.0, self.inputs.labels([0]) is not None
        totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for block in range(predictions.blocks):
            arrays, span = predictions.read(block), predictions.block_range(block)
            rho += float(arrays[RHO].sum(dtype=np.float64)) if RHO in arrays else math.nan
            for start in range(0, len(span) if labelled else 0, EVALUATION_BATCH):
                self._score(totals, task, rows, arrays, span, slice(start, min(len(span), start + EVALUATION_BATCH)))
        metrics = {row: {name: finite(total / count) for name, total in sums.items()} for row, sums in totals.items()}
        return {"rho": finite(rho / count), "metrics": metrics if labelled else None}

    def _score(
        self,
        totals: dict[str, dict[str, float]],
        task: Task,
        rows: Mapping[str, str],
        arrays: dict[str, np.ndarray],
        span: range,
        part: slice,
    ) -> None:
        """Add some rows to the sums."""
        positions = span[part]
        y = self.inputs.labels(positions)
        for row, name in rows.items():
            output = take(stored_output(arrays, name, self.like), part)
            if name == MEMBERS:
                output = tree_map(lambda leaf: leaf[:, 0].contiguous(), output)
            with naming_rows(self.inputs, positions):
                figures = metrics_of(task, output, y)
            for metric, values in figures.items():
                totals[row][metric] += float(values.double().sum())


def prediction_bytes(runner: Runner, x: Tree) -> int:
    """Memory that a sample of x takes while its members are predicted, without its deltas: the prefix's record, and the largest
    outputs."""
    return recorded_bytes(runner.first_pass(x).record, x) + 2 * largest_output(runner.model, runner.forward, x)


def prediction_batch(sample: int, numel: int, members: int, device: torch.device, draws: int = 1) -> int:
    """Samples (of so many bytes, as `prediction_bytes`) to predict at once, with all members of each; `numel` is a delta's, for
    which noise is drawn so often."""
    deltas = 4 * numel * members
    if device.type == "cuda":
        drawn = min(PREDICTED_ON_GPU, int(DRAWS_SHARE * (available_memory() or PREDICTED_ON_GPU / DRAWS_SHARE)))
        wanted = min(drawn // (draws * deltas), int(GPU_SHARE * free_on_gpu(device)) // (sample + COPIES * deltas))
    else:
        wanted = min(PREDICTED_BYTES // deltas, CACHE_BYTES // sample if sample else LARGEST_PREDICTED)
    most = max(1, min(LARGEST_PREDICTED, wanted))
    # Parts of it are chunks of sampled deltas.
    return most // 16 * 16 if most >= 16 else 1 << (most.bit_length() - 1)
