"""Samples of many rows: blocks, batches and what is kept in memory follow their size, and figures do not."""

import itertools

import pytest
import torch
from folders import store
from overfitters import RECIPES, forward, overfitter_of
from torch import nn

from stages.overfitting.batch_size import LARGEST, LEAST, SMALLEST, auto_batch_size, sample_bytes
from stages.per_sample.pass_size import largest_output
from stages.store.delta_store import FEWEST_BLOCKS, LARGEST_BLOCK, SMALL_BLOCK, ArraySpec, block_rows
from stages.tasks import neighbours, scoring
from stages.tasks.data import ArrayDataset, Split
from stages.tasks.losses import REGRESSION, mse
from stages.tasks.protocol import Task

MIB, GIB, CPU = 1 << 20, 1 << 30, torch.device("cpu")


# Blocks


@pytest.mark.parametrize("most", [1, 5, 63])
@pytest.mark.parametrize("samples", [10, 100, 100_000])
def test_a_block_takes_no_longer_than_it_may(most, samples):
    specs = {"rho": ArraySpec("float32", ())}
    assert block_rows(specs, samples, most) == most
    # Where there is no hurry, small stores have blocks of 64, and large ones sixteen blocks or more.
    patient = block_rows(specs, samples)
    assert patient == min(LARGEST_BLOCK, max(SMALL_BLOCK, -(-samples // FEWEST_BLOCKS)))


@pytest.mark.parametrize("most", [1, 40, 10_000])
def test_a_block_is_never_empty_and_no_chunk_too_large(most):
    for numbers in (1, 10_000, 1 << 30):
        rows = block_rows({"delta": ArraySpec("float32", (numbers,))}, 5000, most)
        assert 1 <= rows <= most
        assert rows == 1 or rows * 4 * numbers <= 16 * MIB


# Batches


@pytest.fixture(scope="module")
def overfitter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval().requires_grad_(False)
    return overfitter_of(model, "0.weight", torch.randn(4, 9, 6), RECIPES["adam"])


@pytest.mark.parametrize(
    ("sample", "available", "wanted"),
    [
        (700 * MIB, 1 * GIB, 1),
        (700 * MIB, 0, 1),
        (700 * MIB, 5 * GIB, 1),
        (700 * MIB, 8 * GIB, 2),
        (3 * GIB, 1 * GIB, 1),
        (100 * MIB, 1 * GIB, LEAST),
        (1, 0, LEAST),
        (MIB, None, 64),
        (700 * MIB, None, SMALLEST),
        (1, None, LARGEST),
    ],
)
def test_samples_at_once(overfitter, sample, available, wanted):
    assert auto_batch_size(overfitter, sample, LARGEST, available, CPU) == wanted


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_batches_of_a_block_are_alike(overfitter, rows):
    for sample, available in itertools.product((1, MIB, 40 * MIB, 700 * MIB), (GIB, 64 * GIB)):
        batch = auto_batch_size(overfitter, sample, rows, available, CPU)
        count = -(-rows // batch)
        assert batch == -(-rows // count)
        assert batch * sample <= max(available / 4, GIB, sample)


def test_a_samples_memory_grows_with_its_rows(overfitter):
    model, sizes = overfitter.model, {}
    for rows in (10, 1000):
        x = torch.randn(4, rows, 6)
        sizes[rows] = sample_bytes(overfitter, x, x, factored=False)
        assert largest_output(model, forward, x) == 4 * 5 * rows
        few = sample_bytes(overfitter, x, x[:, :5], factored=False)
        # A step that sees five rows keeps less for the way back; the losses before and after are of all of them.
        assert few < sizes[rows]
        assert few >= 2 * largest_output(model, forward, x)
    assert sizes[1000] > 50 * sizes[10]


# Scores and neighbours


class Rendered(Task):
    """A sample is of many rows, and a figure knows how many samples it is given."""

    kind = REGRESSION

    def __init__(self):
        self.batches = []

    def loss(self, output, y):
        return mse(output, y)

    def metrics(self, output, y):
        self.batches.append(len(output))
        return {"mse": mse(output, y), "largest": (output - y).flatten(1).abs().amax(1)}


@pytest.mark.parametrize(("most", "batches"), [(1 << 40, [13]), (4 * 20 * 8 * 4, [4, 4, 4, 1]), (1, [1] * 13)])
def test_scores_do_not_depend_on_the_batch(monkeypatch, most, batches):
    torch.manual_seed(0)
    model, task, draw = nn.Linear(3, 8), Rendered(), torch.Generator().manual_seed(1)
    x, y = torch.randn(13, 20, 3, generator=draw), torch.randn(13, 20, 8, generator=draw)
    monkeypatch.setattr(scoring, "OUTPUT_BYTES", most)
    found = scoring.mean_metrics(task, model, Split(ArrayDataset(x, y)), CPU)
    assert task.batches == batches
    errors = (model(x) - y).detach().double()
    assert found["mse"] == pytest.approx(float(errors.square().mean()), rel=1e-6)
    assert found["loss"] == pytest.approx(found["mse"])
    assert found["largest"] == pytest.approx(float(errors.flatten(1).abs().amax(1).mean()), rel=1e-6)


def test_candidates_of_large_inputs_come_a_few_at_a_time():
    """Three of these make a block of the most numbers; they take no memory, each being one number many times."""
    x = torch.arange(11.0).view(11, 1, 1).expand(11, 4, neighbours.BLOCK_NUMBERS // 15)
    found = list(neighbours.input_blocks(Task(), Split(ArrayDataset(x, None)), torch.arange(11), CPU))
    assert [(start, len(block)) for start, block in found] == [(0, 3), (3, 3), (6, 3), (9, 2)]
    task = Task()
    # The inputs are read all the same.
    task.coordinates = lambda x: x[:, 0, :2]
    blocks = list(neighbours.input_blocks(task, Split(ArrayDataset(x, None)), torch.arange(11), CPU))
    assert [block.shape for _, block in blocks] == [(3, 2), (3, 2), (3, 2), (2, 2)]
    assert torch.equal(torch.cat([block for _, block in blocks]), x[:, 0, :2])


def test_a_slow_store_has_small_blocks(ocd, project, monkeypatch):
    monkeypatch.setattr("stages.collect.rows_worth_keeping", lambda overfitter, operations: 5)
    folder = project(until="collect")
    assert len(list((folder.run / "collect" / "blocks").glob("*.json"))) == -(-len(store(folder)["rho"]) // 5)
