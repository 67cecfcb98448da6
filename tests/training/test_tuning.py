"""Tuning by the task's own loss: deltas drawn with a gradient, the loss itself, and what it brings."""

from types import SimpleNamespace

import pytest
import torch
from folders import put_all
from planted import HELPING
from torch import nn

from stages.diffusion.conditioning import ConditioningEncoder
from stages.diffusion.delta_batch import DeltaBatch
from stages.diffusion.denoiser import Denoiser, unit
from stages.diffusion.denoising import drawn_with_gradient
from stages.diffusion.sampler import DDIM, Noise, sample
from stages.diffusion.schedule import EPSILON, MEAN, X0, make_schedule
from stages.foundation.seeds import generator
from stages.tasks.data import ArrayDataset, Split
from stages.tasks.protocol import Task
from stages.training.tuning import SAMPLE_STEPS, Tuning

SHAPE = (3, 4)


class Made(Denoiser):
    """A denoiser of one fully connected layer, which notes what it is shown."""

    def __init__(self, prediction):
        super().__init__()
        self.shape, self.prediction, self.seen = SHAPE, prediction, []
        self.encoder = ConditioningEncoder({"a": 2}, 8)
        self.layer = nn.Linear(12 + 8 + 1, 12)

    def encode(self, fields):
        return self.encoder(fields)

    def forward(self, noisy, t, encoded):
        self.seen.append((noisy.detach().clone(), t.clone(), torch.is_grad_enabled()))
        return self.layer(torch.cat([noisy.flatten(1), encoded, t.unsqueeze(1) / 1000], dim=1)).view(-1, *SHAPE)


def made(prediction=X0):
    torch.manual_seed(0)
    return Made(prediction)


def first_noise(count):
    return Noise([generator("test", i) for i in range(count)], SHAPE, torch.device("cpu"))


@pytest.mark.parametrize("prediction", [X0, EPSILON, MEAN])
def test_after_all_passes_it_is_the_sampler(prediction):
    denoiser, schedule = made(prediction), make_schedule("ddpm", 12, X0)
    fields = {"a": torch.randn(5, 2)}
    encoded = denoiser.encode(fields)
    options = {"prediction": prediction, "sampler": DDIM, "sample_steps": 10}
    wanted = sample(lambda noisy, t: denoiser(noisy, t, encoded), schedule, first_noise(5), **options)
    found = drawn_with_gradient(denoiser, schedule, encoded, first_noise(5).draw(), 10, 10)
    torch.testing.assert_close(found, unit(wanted), rtol=1e-5, atol=1e-5)


def test_the_gradient_is_that_of_the_last_pass():
    denoiser, schedule = made(), make_schedule("ddpm", 12, X0)
    fields, direction = {"a": torch.randn(5, 2)}, torch.randn(5, *SHAPE)
    found = drawn_with_gradient(denoiser, schedule, denoiser.encode(fields), first_noise(5).draw(), 3, 10)
    assert [grad for *_, grad in denoiser.seen] == [False, False, True]
    gradient = torch.autograd.grad((found * direction).sum(), list(denoiser.parameters()), allow_unused=True)
    noisy, t, _ = denoiser.seen[-1]
    alone = unit(denoiser(noisy, t, denoiser.encode(fields)))
    wanted = torch.autograd.grad((alone * direction).sum(), list(denoiser.parameters()), allow_unused=True)
    for one, other in zip(gradient, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_denoiser_that_begins_with_zeros_has_a_gradient():
    denoiser, schedule = made(), make_schedule("ddpm", 12, X0)
    nn.init.zeros_(denoiser.layer.weight)
    nn.init.zeros_(denoiser.layer.bias)
    encoded = denoiser.encode({"a": torch.randn(5, 2)})
    found = drawn_with_gradient(denoiser, schedule, encoded, first_noise(5).draw(), 1, 10)
    (gradient,) = torch.autograd.grad(found.sum(), denoiser.layer.bias)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().min() > 0


class Fit(Task):
    def loss(self, output, y):
        return (output - y).square().mean(1)


def predicted(fields):
    """log ρ̂ of each row."""
    return fields["a"].mean(1)


def tuning(samples=3):
    """Of y = W x, with rows that are samples 4, 4, 1, 1, 3, 3 of five."""
    torch.manual_seed(1)
    x, y, base = torch.randn(5, 4), torch.randn(5, 3), torch.randn(*SHAPE)
    overfitter = SimpleNamespace(
        model=None,
        layer=SimpleNamespace(weight=lambda model: base, shape=SHAPE),
        method=lambda inputs, weights: torch.einsum("boi,bi->bo", weights, inputs),
    )
    index, schedule = torch.tensor([4, 4, 1, 1, 3, 3]), make_schedule("ddpm", 12, X0)
    return Tuning(Fit(), predicted, overfitter, Split(ArrayDataset(x, y)), index, 0.5, schedule, 0, samples, 10 * samples), (
        x,
        y,
        base,
    )


def some_rows(numbers):
    count = len(numbers)
    return DeltaBatch({"a": torch.randn(count, 2)}, torch.rand(count) + 0.5, torch.randn(count, *SHAPE), torch.tensor(numbers))


def test_it_is_the_loss_with_the_drawn_delta():
    (found, (x, y, base)), denoiser, rows = tuning(), made(), some_rows([5, 2, 0])
    losses = found(denoiser, rows, 7)
    passes = len(denoiser.seen)
    assert 1 <= passes <= SAMPLE_STEPS
    draws = [generator(0, "train-diffusion", "tune", 7, number) for number in (5, 2, 0)]
    noise = torch.stack([torch.randn(SHAPE, generator=draw) for draw in draws])
    drawn = drawn_with_gradient(denoiser, found.schedule, denoiser.encode(rows.fields), noise, passes, SAMPLE_STEPS)
    wanted = []
    for place, sample_number in enumerate((3, 1, 4)):
        weight = base + predicted(rows.fields)[place].exp() * drawn[place] / drawn[place].norm()
        wanted.append((weight @ x[sample_number] - y[sample_number]).square().mean() / 0.5)
    torch.testing.assert_close(losses, torch.stack(wanted), rtol=1e-5, atol=1e-6)
    assert losses.requires_grad


def test_it_is_computed_after_every_number_of_passes():
    found, denoiser, rows = tuning()[0], made(), some_rows([0, 1, 2])
    seen = set()
    for step in range(100):
        denoiser.seen.clear()
        found(denoiser, rows, step)
        seen.add(len(denoiser.seen))
    assert seen == set(range(1, SAMPLE_STEPS + 1))


def test_judging_repeats_itself():
    (found, _), denoiser, held_out = tuning(), made(), some_rows([5, 0, 3])
    value = found.held_out_loss(denoiser, held_out, 16)
    assert value == found.held_out_loss(denoiser, held_out, 16)


def test_noise_on_the_conditioning_is_for_training_alone():
    encoder, fields = ConditioningEncoder({"a": 3}, 8), {"a": torch.randn(4000, 3)}
    encoder.noise = 0.5
    assert torch.equal(encoder.eval()(fields), encoder(fields))
    noisy = encoder.train()(fields) - encoder.eval()(fields)
    wanted = 0.5 * encoder.encoders["of_a"].weight.norm(dim=1)
    # The standard deviation of 4,000 draws is right to about 1 %.
    torch.testing.assert_close(noisy.std(0), wanted, rtol=0.06, atol=0)


def test_deltas_that_are_trained_by_what_they_do_do_more(ocd, project):
    """A base whose residual is a known function of what the layer sees: with the task's loss it falls further."""
    folder = project(HELPING, "infer", code="planted")
    plain = ocd.json(folder, "infer")["metrics"]["ocd ensemble"]["mse"]
    words = put_all("train-diffusion", {"tune_after": 100, "tune_samples": 32, "conditioning_noise": 0.05})
    shown = ocd(folder, "train-diffusion", "--force", *words).stdout
    assert "held-out loss of the task with generated deltas 0." in shown
    assert "tuned by that loss, deltas need not be near the true ones\n" in shown
    assert "expect no gain" not in shown
    assert ocd.json(folder, "train-diffusion", *words)["held_out_task_loss"] < 1
    ocd(folder, "infer", *words)
    assert ocd.json(folder, "infer", *words)["metrics"]["ocd ensemble"]["mse"] < 0.9 * plain


def test_an_extended_training_is_the_same_as_a_whole_one(ocd, project):
    folder = project(HELPING, "collect", code="planted")
    ocd(folder, "train-scale")
    words = put_all("train-diffusion", {"tune_after": 10, "conditioning_noise": 0.1})
    weights = folder.run / "train-diffusion" / "denoiser.safetensors"
    ocd(folder, "train-diffusion", *words, "--set", "train-diffusion.max_steps=40")
    whole = weights.read_bytes()
    ocd(folder, "train-diffusion", "--force", *words, "--set", "train-diffusion.max_steps=15")
    assert weights.read_bytes() != whole
    ocd(folder, "train-diffusion", *words, "--set", "train-diffusion.max_steps=40")
    assert weights.read_bytes() == whole


def test_only_a_tuned_denoiser_depends_on_the_task(ocd, project):
    """What only tuning reads of the task leaves base and deltas as they are."""
    folder = project(HELPING, code="planted")
    short = ["--set", "train-diffusion.max_steps=20"]
    tuned = [*short, "--set", "train-diffusion.tune_after=10"]
    code, weights = folder.root / "mytask.py", folder.run / "train-diffusion" / "denoiser.safetensors"

    def with_glance(factor):
        start = code.read_text().partition("class Planted(Planted)")[0]
        glance = f"    def glance(self, x, y, generator):\n        return {factor} * x, y\n"
        code.write_text(f"{start}class Planted(Planted):\n{glance}")
        for stage in ("train-base", "select-layer", "collect", "train-scale"):
            ocd(folder, stage, "--force")

    with_glance(1)
    ocd(folder, "train-diffusion", *tuned)
    assert "up to date" in ocd(folder, "train-diffusion", *tuned).stdout
    before = weights.read_bytes()
    with_glance(0)
    assert "code mytask.py" in ocd(folder, "train-diffusion", *tuned, code=3).stderr
    ocd(folder, "train-diffusion", *tuned, "--force")
    assert weights.read_bytes() != before
    shown = ocd(folder, "train-diffusion", *short, code=3).stderr
    assert "stale: train-diffusion.tune_after was 10, is now 0\n" in shown
    ocd(folder, "train-diffusion", *short, "--force")
    with_glance(2)
    assert "up to date" in ocd(folder, "train-diffusion", *short).stdout


def test_losses_may_be_negative(ocd, project):
    folder = project(HELPING, code="planted")
    folder.edit("mytask.py", "return mse(output, y)", "return mse(output, y) - 5")
    words = put_all("train-diffusion", {"tune_after": 5, "max_steps": 10})
    ocd(folder, "run", "--until", "train-diffusion", *words)
    # A unit is about five, and the error itself about one.
    assert -1.5 < ocd.json(folder, "train-diffusion", *words)["held_out_task_loss"] < 0


def test_predicted_lengths_come_first(ocd, project):
    """`run` trains the scale network before a denoiser that is tuned, and the stage alone asks for it."""
    folder, words = project(HELPING, "collect", code="planted"), put_all("train-diffusion", {"tune_after": 5, "max_steps": 10})
    stderr = ocd(folder, "train-diffusion", *words, code=3).stderr
    # With the flags that the stages after it are given.
    flags = " ".join(words)
    assert (
        f"error: train-diffusion needs stages that are not done:\n  train-scale is missing\n  run: ocd train-scale {flags}\n"
        in stderr
    )
    found = ocd.json(folder, "run", "--until", "train-diffusion", *words)["stages"]
    assert list(found)[-2:] == ["train-scale", "train-diffusion"]
    assert folder.read("train-diffusion/denoiser.json")["lengthens"]
    # Where the scale network begins, the denoiser that reads it follows.
    again = ocd.json(folder, "run", "--from", "train-scale", "--until", "train-scale", "--force", *words)["stages"]
    assert list(again) == ["train-scale", "train-diffusion"]
    assert list(ocd.json(folder, "run", "--from", "train-diffusion", "--until", "train-diffusion", *words)["stages"]) == [
        "train-diffusion"
    ]
    narrow = ("--set", "train-scale.width=8")
    ocd(folder, "train-scale", "--force", *narrow)
    assert "train-diffusion is stale: content of scale was " in ocd(folder, "train-diffusion", *words, *narrow, code=3).stderr


def test_tuning_that_would_never_begin_is_refused(ocd, project):
    folder = project(HELPING, "collect", code="planted")
    ocd(folder, "train-scale")
    words = put_all("train-diffusion", {"tune_after": 40, "max_steps": 40})
    stderr = ocd(folder, "train-diffusion", *words, code=2).stderr
    assert "train-diffusion.tune_after = 40, but the training ends at max_steps = 40: nothing is tuned" in stderr
    assert "give it fewer than 40 steps on deltas, or 0 for no tuning" in stderr
