"""What tuning is judged on: validation samples where nothing has learned from them, which change the choice alone."""

import dataclasses

import torch
from planted import HELPING

from stages.diffusion.denoiser import Lengths
from stages.foundation.progress import Silent
from stages.lifecycle.context import RunContext
from stages.prediction.for_training import judged_on, overfitter_of, tuning_of
from stages.run_directory.project import load_project
from stages.tasks.conditioning import fields_of
from stages.tasks.data import ArrayDataset, Split
from stages.train_diffusion import TrainDiffusion
from stages.training.tuning import spread

TUNED = tuple(f"train-diffusion.{text}" for text in ("tune_after=50", "tune_samples=8", "max_steps=100"))
# Samples of steps between two evaluations, of which a tenth are judged.
BETWEEN = 320


def judged(folder, *overrides):
    context = RunContext(load_project(folder.config, overrides=overrides), Silent())
    return context, judged_on(context, overfitter_of(context), BETWEEN, None)


def test_it_is_judged_on_validation_samples_as_the_base_sees_them(make_run):
    context, found = judged(make_run(HELPING, "planted", "train-scale"))
    split = context.splits["validation"]
    assert found.split is split
    assert found.rows.numbers.tolist() == spread(len(split), BETWEEN).tolist()
    assert len(found.rows) == 32
    x, y = split.batch(found.rows.numbers)
    first = overfitter_of(context).first_pass(x)
    wanted = fields_of(context.task, torch.nn.Linear, x, first.output, first.captured)[0]
    for name, value in wanted.items():
        torch.testing.assert_close(found.rows.fields[name], value)
    torch.testing.assert_close(torch.tensor(found.loss_size), context.task.loss(first.output, y).mean())


def test_what_the_store_has_learned_from_judges_nothing(make_run):
    folder = make_run(HELPING, "planted", "train-scale")
    assert judged(folder, "collect.split=validation")[1] is None
    # All of train is not the validation set that this task has of its own.
    assert judged(folder, "collect.split=all")[1] is not None


def test_labels_of_validation_samples_change_the_choice_alone(make_run):
    """Other labels there: the same losses of training, another score."""
    context, found = judged(make_run(HELPING, "planted", "train-scale"))
    stage = TrainDiffusion(RunContext(load_project(context.project.config_path, overrides=TUNED), Silent()))
    settings = stage.decided({})
    training, tuning = stage.training(settings, 8), tuning_of(stage.context, settings, None)
    x, y = found.split.batch(torch.arange(len(found.split)))
    split = Split(ArrayDataset(x, y.flip(0)))
    other = dataclasses.replace(tuning, judged=dataclasses.replace(tuning.judged, split=split))
    rows = next(training.batches.batches(0)).take(slice(8))
    assert torch.equal(tuning(training.denoiser, rows, 60), other(training.denoiser, rows, 60))
    scores = [one.held_out_loss(training.denoiser, training.batches.held_out, 8) for one in (tuning, other)]
    assert scores[0] != scores[1]


def test_lengths_are_a_sum():
    torch.manual_seed(0)
    lengths, rho, encoded = Lengths(4), torch.tensor([1e-6, 0.5, 2.0]), torch.randn(3, 6)
    assert torch.equal(lengths(encoded, rho), rho)
    lengths.mean.fill_(0.3)
    with torch.no_grad():
        lengths.body[-1].bias.fill_(2.0)
    torch.testing.assert_close(lengths(encoded, rho), rho + 0.6)
    with torch.no_grad():
        lengths.body[-1].bias.fill_(-20.0)
    torch.testing.assert_close(lengths(encoded, rho), rho / 8)
