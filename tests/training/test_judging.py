"""What tuning is judged on: validation samples where nothing has learned from them, which change the choice alone."""

import torch
from folders import put_all
from planted import HELPING

from stages.diffusion.denoiser import Lengths
from stages.foundation.progress import Silent
from stages.lifecycle.context import RunContext
from stages.prediction.for_training import judged_on, overfitter_of
from stages.run_directory.project import load_project
from stages.tasks.conditioning import fields_of
from stages.training.tuning import spread

TUNED = {"tune_after": 50, "tune_samples": 8, "max_steps": 100, "evaluate_steps": 25}


def judged(folder, *overrides):
    context = RunContext(load_project(folder.config, overrides=overrides), Silent())
    return context, judged_on(context, overfitter_of(context), 8, None)


def test_it_is_judged_on_validation_samples_as_the_base_sees_them(make_run):
    context, found = judged(make_run(HELPING, "planted", "train-scale"))
    split = context.splits["validation"]
    assert found.split is split
    assert found.rows.numbers.tolist() == spread(len(split), 8).tolist()
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
    assert judged(folder, "collect.split=all")[1] is None


def test_labels_of_validation_samples_change_the_choice_alone(ocd, make_run, tmp_path):
    """Other labels there: the same steps, the same losses of training, another score."""
    folder = make_run(HELPING, "planted", "train-scale").copy(tmp_path / "copy")
    words = put_all("train-diffusion", TUNED)
    ocd(folder, "train-diffusion", *words, "--force")
    before = folder.read("train-diffusion/metrics.jsonl")
    code = folder.root / "mytask.py"
    code.write_text(
        code.read_text() + "\n\nPlanted.validation = lambda self: (lambda d: ArrayDataset(d.x, d.y.flip(0)))"
        "(Planted.points(self, 'validation'))\n"
    )
    ocd(folder, "train-diffusion", *words, "--force")
    after = folder.read("train-diffusion/metrics.jsonl")
    assert [row["loss"] for row in after] == [row["loss"] for row in before]
    assert [row["score"] for row in after] != [row["score"] for row in before]


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
