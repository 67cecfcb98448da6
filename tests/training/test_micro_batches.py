"""Parts of a batch that memory has room for: how large they are, that they add up, and what happens where none fits."""

import re
import weakref

import pytest
import torch
from folders import store
from networks import describe, random, sketch
from trainings import QUICK, losses_of, words

from stages.diffusion.delta_batch import DeltaBatch
from stages.diffusion.denoisers import MLP, SMALL, make_denoiser
from stages.diffusion.denoising import step_draws
from stages.diffusion.mlp import MlpDenoiser
from stages.diffusion.schedule import X0, make_schedule
from stages.foundation.config import TrainDiffusionTable
from stages.foundation.errors import ComputeError
from stages.run_directory.descriptions import DenoiserDescription
from stages.training import denoiser as denoiser_training
from stages.training.denoiser import MEMORY_SHARE, MOST_ON_CPU, DenoiserSettings, micro_batch
from stages.training.denoising_steps import DenoisingSteps
from stages.training.memory import training_bytes
from stages.training.ranks import Ranks
from stages.training.trainer import Trainer

FIELDS, CPU = {"layer_input": 7, "activation": 5}, torch.device("cpu")


def decided(preset=SMALL, batch_size=64, micro_batch_size="auto"):
    """Settings with nothing left to decide."""
    table = TrainDiffusionTable(micro_batch_size=micro_batch_size)
    description = describe(preset, (16, 16), FIELDS) | {"schedule": "ddpm"}
    record = DenoiserDescription(**{key: value for key, value in description.items() if key not in ("lr", "batch_size")})
    return DenoiserSettings(table, record, 1e-3, batch_size, 0, 0, False, 0, lambda: make_denoiser(description))


def with_memory(monkeypatch, free):
    monkeypatch.setattr(denoiser_training, "free_memory", lambda device: free)


@pytest.mark.parametrize(("fits", "wanted"), [(100, 64), (64, 64), (63, 32), (16, 16), (15, 8), (1, 1)])
def test_micro_batches_are_halved_until_they_fit(monkeypatch, fits, wanted):
    settings = decided(MLP)
    with_memory(monkeypatch, training_bytes(settings.sketch, fits))
    assert micro_batch(settings, 1, CPU) == wanted


def test_micro_batches_of_u_nets_on_a_cpu_are_small(monkeypatch):
    with_memory(monkeypatch, 2**60)
    assert micro_batch(decided(), 1, CPU) == MOST_ON_CPU == 16
    assert micro_batch(decided(batch_size=5), 1, CPU) == 5
    assert micro_batch(decided(batch_size=9), 2, CPU) == 5
    assert micro_batch(decided(micro_batch_size=48), 1, CPU) == 48
    assert micro_batch(decided(micro_batch_size=100), 1, CPU) == 64
    assert micro_batch(decided(MLP), 1, CPU) == 64


def test_free_memory_is_a_share_of_what_is_available(monkeypatch):
    monkeypatch.setattr(denoiser_training, "available_memory", lambda: 1000)
    assert denoiser_training.free_memory(CPU) == int(MEMORY_SHARE * 1000)
    monkeypatch.setattr(denoiser_training, "available_memory", lambda: None)
    assert denoiser_training.free_memory(CPU) > 2**60


SHAPE, BATCH, SCHEDULE = (3, 4), 16, make_schedule("ddpm", 12, X0)


class Full(MlpDenoiser):
    """Out of memory with more than so many rows."""

    most = 10**9

    def forward(self, noisy, t, encoded):
        if len(noisy) > self.most:
            raise torch.OutOfMemoryError("simulated")
        return super().forward(noisy, t, encoded)


def training(micro, on_progress=None, kind=Full, **more):
    """A trainer of a few steps, its steps, and its denoiser."""
    torch.manual_seed(0)
    denoiser = kind(SHAPE, make_denoiser(describe(MLP, SHAPE, FIELDS, width=16)).encoder, 16, 2, X0)

    def batches(step):
        while True:
            fields = {name: random(BATCH, width, seed=step) for name, width in FIELDS.items()}
            rows = DeltaBatch(fields, torch.ones(BATCH), random(BATCH, *SHAPE, seed=step), torch.arange(BATCH) + 100 * step)
            yield rows, *step_draws(BATCH, SHAPE, SCHEDULE.steps, step)
            step += 1

    smaller = (lambda rows: None) if on_progress is None else on_progress.append
    options = {"batch_size": BATCH, "micro_batch": micro, "half": False, "ranks": Ranks(), "seed": 0}
    steps = DenoisingSteps(denoiser, SCHEDULE, batches, smaller=smaller, **options, **more)
    return Trainer(denoiser, torch.optim.AdamW(denoiser.parameters(), lr=1e-2), steps), steps, denoiser


def losses(micro):
    trainer, _, _ = training(micro)
    return [trainer.advance() for _ in range(10)], trainer


@pytest.mark.parametrize("micro", [1, 3, 8, 15])
def test_micro_batches_train_as_whole_batches_do(micro):
    whole, trainer = losses(BATCH)
    found, parts = losses(micro)
    # The same sums in another order, in float32, over ten steps.
    assert found == pytest.approx(whole, rel=1e-5)
    assert whole[-1] < whole[0]
    for one, other in zip(trainer.network.parameters(), parts.network.parameters(), strict=True):
        # Adam divides by the gradients' size, and so keeps the rounding of small ones.
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)


class Tuning:
    """A loss by the conditioning alone; out of memory with more than so many rows, as the user's own model says it."""

    def __init__(self, samples, most):
        self.samples, self._most = samples, most

    def __call__(self, denoiser, rows, step, precision):
        try:
            if len(rows) > self._most:
                raise torch.OutOfMemoryError("simulated")
        except torch.OutOfMemoryError as error:
            raise ComputeError("the model's forward pass: out of memory") from error
        with precision():
            return denoiser.encode(rows.fields).square().mean(1)


def test_a_step_of_tuning_is_divided_where_memory_runs_out():
    whole, parts = [], []
    for found, most in ((whole, BATCH), (parts, 3)):
        on_progress = []
        trainer, steps, _ = training(BATCH, on_progress)
        steps.tuning = Tuning(BATCH, most)
        found += [trainer.advance() for _ in range(4)]
        assert on_progress == ([] if most == BATCH else [8, 4, 2])
    assert parts == pytest.approx(whole, rel=1e-5)
    trainer, steps, _ = training(BATCH)
    steps.tuning = Tuning(BATCH, 0)
    with pytest.raises(ComputeError, match="out of memory"):
        trainer.advance()


def test_what_is_judged_is_halved_too():
    _, steps, _ = training(BATCH)
    tried = []

    def judge(size):
        tried.append(size)
        if size > 3:
            raise torch.OutOfMemoryError("simulated")
        return "judged"

    assert steps.at_once.whole(judge) == "judged"
    assert tried == [16, 8, 4, 2]


def broken_compiler(graph, inputs):
    raise RuntimeError("no compiler here\nand a long story")


@pytest.mark.parametrize("first", [0, 5])
def test_a_training_that_cannot_be_compiled_goes_on_without(first):
    """From its first step in this process, which need not be the training's."""
    found = []
    for breaks in (False, True):
        said = []
        trainer, steps, denoiser = training(BATCH, compiled=breaks, plain=said.append)
        trainer.step = first
        if breaks:
            denoiser.compile(backend=broken_compiler)
        found.append([trainer.advance() for _ in range(3)])
        assert len(said) == breaks
    assert found[0] == found[1]
    assert "no compiler here" in said[0]
    assert "\n" not in said[0]
    # Tuning runs the same denoiser.
    steps.tuning = Tuning(BATCH, BATCH)
    assert trainer.advance() > 0


def test_what_fails_beside_a_compiler_is_no_fault_of_its():
    trainer, _, denoiser = training(BATCH, compiled=True, plain=lambda reason: pytest.fail(reason))
    with pytest.raises(ValueError, match="of another kind") as caught:
        denoiser.embed.register_forward_hook(lambda *_: (_ for _ in ()).throw(ValueError("of another kind")))
        trainer.advance()
    # Where it was raised is known.
    assert any(entry.name == "forward" for entry in caught.traceback)


def test_memory_that_runs_out_while_moments_are_made(monkeypatch):
    """Some parameters have half of theirs then; the step is tried again from the beginning."""
    whole, _ = losses(BATCH)
    trainer, _, _ = training(BATCH, said := [])
    zeros_like, calls = torch.zeros_like, []

    def fails_once(*args, **named):
        calls.append(args)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("simulated")
        return zeros_like(*args, **named)

    monkeypatch.setattr(torch, "zeros_like", fails_once)
    found = [trainer.advance() for _ in range(10)]
    assert said == [8]
    assert found == pytest.approx(whole, rel=1e-5)


def test_what_other_ranks_have_heard_of_is_not_done_again_by_one(monkeypatch):
    trainer, _, _ = training(BATCH)
    trainer.ranks = Ranks(0, 2)
    monkeypatch.setattr(Ranks, "reduce", lambda self, network, loss: loss)
    monkeypatch.setattr(trainer.optimizer, "step", lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("simulated")))
    with pytest.raises(torch.OutOfMemoryError):
        trainer.advance()


def test_a_failed_try_is_forgotten_before_the_next():
    """What it held is free when half as much is tried, though the user's code has wrapped the error."""
    trainer, steps, _ = training(BATCH)
    kept = []

    class Holding(Tuning):
        def __call__(self, denoiser, rows, step, precision):
            large = torch.zeros(1000)
            assert all(one() is None for one in kept), "the failed try is still there"
            kept.append(weakref.ref(large))
            return super().__call__(denoiser, rows, step, precision) + 0 * large.sum()

    steps.tuning = Holding(BATCH, BATCH // 2)
    trainer.advance()
    assert len(kept) == 3


def test_running_out_of_memory_halves_the_micro_batch_and_goes_on():
    whole, _ = losses(BATCH)
    on_progress = []
    trainer, steps, denoiser = training(BATCH, on_progress)
    denoiser.most = 5
    found = [trainer.advance() for _ in range(3)]
    assert on_progress == [8, 4]
    # Later on there is less still.
    denoiser.most = 1
    found += [trainer.advance() for _ in range(7)]
    assert on_progress == [8, 4, 2, 1]
    assert steps.micro_batch == 1
    assert trainer.step == 10
    # The same sums in another order, in float32.
    assert found == pytest.approx(whole, rel=1e-5)


def test_running_out_of_memory_within_a_batch_leaves_no_trace():
    """The first half of the batch has left its gradients when memory runs out in the second."""
    whole, one = losses(BATCH)
    trainer, _, denoiser = training(8)
    forward, calls = denoiser.forward, []

    def second_fails(*args):
        calls.append(len(args[0]))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("simulated")
        return forward(*args)

    denoiser.forward = second_fails
    assert trainer.advance() == pytest.approx(whole[0], rel=1e-5)
    assert calls == [8, 8, 4, 4, 4, 4]
    denoiser.forward = forward
    assert [trainer.advance() for _ in range(9)] == pytest.approx(whole[1:], rel=1e-5)
    assert trainer.step == one.step


def test_one_row_that_does_not_fit_ends_the_training():
    trainer, _, denoiser = training(2)
    denoiser.most = 0
    with pytest.raises(torch.OutOfMemoryError):
        trainer.advance()
    assert trainer.step == 0


# From the command line


def u_net(project, **settings):
    chosen = {"preset": "small", "width": 32, "blocks": "auto", "max_steps": 2, "evaluate_steps": 1, **settings}
    return project({"train-diffusion": chosen})


def planned(folder, micro, preset=SMALL, **settings):
    """Bytes that training takes by the estimate."""
    found = store(folder)
    fields = {name: found[name][0].size for name in ("layer_input", "activation", "base_output")}
    shape = found["delta"].shape[1:]
    return training_bytes(sketch(preset, shape, fields, **settings), micro)


def refused(ocd, folder, monkeypatch, free, *words):
    """What is said where there is too little memory; nothing is written."""
    monkeypatch.setattr(denoiser_training, "available_memory", lambda: int(free / MEMORY_SHARE) + 1)
    before = folder.files()
    said = ocd(folder, "train-diffusion", *words, code=4).stderr
    assert folder.files() == before
    return " ".join(said.split())


def test_a_training_that_does_not_fit_is_refused(ocd, project, monkeypatch):
    folder = u_net(project)
    ocd(folder, "run", "--quiet", "--until", "collect")
    shape = "×".join(map(str, store(folder)["delta"].shape[1:]))
    needed = planned(folder, 1, width=32)
    said = refused(ocd, folder, monkeypatch, needed - 1000)
    free = denoiser_training.free_memory(CPU)
    wanted = f"training preset small of width 32 on deltas of {shape} takes about {needed:,} bytes of memory with 1 at once; "
    assert wanted + f"{free:,} may be taken" in said
    assert "a smaller network with --set train-diffusion.width=N or --set train-diffusion.preset=mlp" in said
    ocd(folder, "train-diffusion", "--quiet", "--set", "train-diffusion.width=8")


def test_a_micro_batch_of_ones_own_that_does_not_fit_is_refused(ocd, project, monkeypatch):
    shape = {"width": 8, "multipliers": [1, 2, 2]}
    folder = u_net(project, **shape, micro_batch_size=16)
    ocd(folder, "run", "--quiet", "--until", "collect")
    said = refused(ocd, folder, monkeypatch, planned(folder, 16, **shape) - 1000)
    assert "fewer at once with --set train-diffusion.micro_batch_size=auto" in said
    ocd(folder, "train-diffusion", "--quiet", "--set", "train-diffusion.micro_batch_size=auto")


def test_running_out_of_memory_is_told_and_trained_through(ocd, untrained, monkeypatch):
    whole, _ = losses_of(ocd, untrained, *words(QUICK))
    forward, sizes = MlpDenoiser.forward, []

    def full(self, noisy, t, encoded):
        # Not where memory is estimated, without numbers.
        if torch.is_grad_enabled() and not noisy.is_meta:
            sizes.append(len(noisy))
            if len(noisy) > 3:
                raise torch.OutOfMemoryError("simulated")
        return forward(self, noisy, t, encoded)

    monkeypatch.setattr(MlpDenoiser, "forward", full)
    said = ocd(untrained, "train-diffusion", *words(QUICK), "--force").stderr
    assert re.findall(r"memory ran out: from here on (\d+) deltas at once", said) == ["5", "3"]
    assert sizes[:3] == [9, 5, 3]
    assert max(sizes[2:]) == 3
    # The same sums in another order.
    assert [row["loss"] for row in untrained.read("train-diffusion/metrics.jsonl")] == pytest.approx(whole, rel=1e-4)
