"""Which validation samples neither training has seen."""

from types import SimpleNamespace

import pytest
import torch

from stages.diffusion.delta_batch import usable_split
from stages.evaluation.from_run import unseen
from stages.tasks.data import ArrayDataset, Split


class Store:
    """Two rows a sample, one of which is degenerate in all but the last samples."""

    def __init__(self, samples):
        self.sample_index = torch.arange(100, 100 + samples).repeat_interleave(2)
        self.degenerate = torch.tensor([False, True]).repeat(samples)
        self.degenerate[-8:] = True
        self.rho = torch.where(self.degenerate, 0.0, 1.0)
        self.usable = torch.nonzero(~self.degenerate).squeeze(1)

    def __len__(self):
        return len(self.rho)


@pytest.mark.parametrize("seed", range(3))
def test_a_sample_with_a_row_in_training_is_not_unseen(seed):
    """Though another of its rows is degenerate, which no training draws."""
    training, tables = Store(30), SimpleNamespace(held_out=0.3)
    splits = {"validation": Split(ArrayDataset(torch.zeros(140, 1), None), torch.arange(95, 140))}
    settings = SimpleNamespace(train_diffusion=tables, train_scale=tables)
    project = SimpleNamespace(settings=settings)
    context = SimpleNamespace(splits=splits, project=project, validation_is_given=False, seed=seed)
    found = splits["validation"].rows[unseen(context, training)]
    drawn, held_out = usable_split(training.degenerate, training.rho, training.sample_index, 0.3, seed)
    assert not set(found.tolist()) & set(training.sample_index[drawn].tolist())
    assert set(training.sample_index[held_out].tolist()) <= set(found.tolist())
    # Those that are not in the store at all, and some of those that are degenerate altogether.
    assert {*range(95, 100), *range(130, 140)} <= set(found.tolist())
    assert set(found.tolist()) & set(range(126, 130)) != set(range(126, 130))
