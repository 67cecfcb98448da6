"""The trainer: averages, batches by epochs, going on bit for bit, warm-up, clipping and steps that are not taken."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import make_fields, make_scale, random, shaken
from torch import nn

from stages.diffusion.scale import scale_loss
from stages.foundation.tensors import load_tensors, save_tensors
from stages.training.trainer import CLIP_NORM, EMA_DECAY, WARM_UP_STEPS, Stream, Trainer, batch_rows, ema_decay


def test_decay_of_the_average_warms_up():
    assert ema_decay(0) == pytest.approx(0.1)
    assert ema_decay(90) == pytest.approx(0.91)
    assert ema_decay(10**7) == EMA_DECAY
    values = [ema_decay(step) for step in range(0, 200_000, 1000)]
    assert values == sorted(values)


@given(count=st.integers(1, 40), batch=st.integers(1, 60), steps=st.integers(1, 30))
def test_epochs_are_permutations(count, batch, steps):
    rows = torch.cat([batch_rows(count, batch, step, 3, "test") for step in range(steps)])
    assert len(rows) == batch * steps
    for epoch in rows[: len(rows) // count * count].view(-1, count):
        assert sorted(epoch.tolist()) == list(range(count))
    last = rows[len(rows) // count * count :].tolist()
    assert len(set(last)) == len(last)


def test_batches_depend_on_seed_and_step_alone():
    assert torch.equal(batch_rows(100, 30, 17, 3, "a"), batch_rows(100, 30, 17, 3, "a"))
    assert not torch.equal(batch_rows(100, 100, 0, 3, "a"), batch_rows(100, 100, 0, 4, "a"))
    assert not torch.equal(batch_rows(100, 100, 0, 3, "a"), batch_rows(100, 100, 0, 3, "b"))
    assert not torch.equal(batch_rows(100, 100, 0, 3, "a"), batch_rows(100, 100, 1, 3, "a"))


def make_trainer(**options):
    """A scale network in training on a few rows, with an optimizer that keeps moments."""
    network, fields, rho = make_scale(), make_fields(20, seed=5), random(20, seed=9).exp()

    def step_loss(step):
        rows = batch_rows(20, 8, step, 0)
        yield scale_loss(network({name: value[rows] for name, value in fields.items()}), rho[rows], "log").mean()

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    return Trainer(network, optimizer, step_loss, **options)


@pytest.mark.parametrize("options", [{}, {"average": False}, {"cosine_steps": 15}, {"clip": False}], ids=str)
@pytest.mark.parametrize("stop", [0, 1, 6])
def test_training_continues_bit_for_bit(options, stop):
    unbroken = make_trainer(**options)
    losses = [unbroken.advance() for _ in range(12)]
    first = make_trainer(**options)
    assert [first.advance() for _ in range(stop)] == losses[:stop]
    saved = {name: value.clone() for name, value in first.state().items()}
    first.advance()
    second = make_trainer(**options)
    shaken(second.network)
    second.restore(saved, stop)
    assert [second.advance() for _ in range(stop, 12)] == losses[stop:]
    wanted, found = unbroken.state(), second.state()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    for one, other in zip(unbroken.averaged.state_dict().values(), second.averaged.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_tied_network_continues(tmp_path):
    """A file takes no tensor under two names."""

    def tied():
        network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        network[1].weight = network[0].weight
        return Trainer(
            network, torch.optim.AdamW(network.parameters(), lr=0.1), lambda step: iter([network(x).square().mean()])
        )

    x, first, second = random(5, 4), tied(), tied()
    first.advance()
    save_tensors(tmp_path / "state", first.state())
    save_tensors(tmp_path / "snapshot", first.snapshot())
    second.restore(load_tensors(tmp_path / "state"), 1)
    assert second.network[1].weight is second.network[0].weight
    assert first.advance() == second.advance()
    kept = load_tensors(tmp_path / "snapshot")
    assert torch.equal(kept["0.weight"], kept["1.weight"])


def test_average_is_the_exponential_moving_average_by_hand():
    trainer = make_trainer()
    wanted = {name: value.detach().double() for name, value in trainer.network.named_parameters()}
    for step in range(5):
        trainer.advance()
        decay = (1 + step) / (10 + step)
        for name, value in trainer.network.named_parameters():
            wanted[name] = decay * wanted[name] + (1 - decay) * value.detach().double()
    for name, value in trainer.averaged.named_parameters():
        torch.testing.assert_close(value.double(), wanted[name], rtol=1e-5, atol=1e-7)
        assert not value.requires_grad
    for name, value in trainer.averaged.named_buffers():
        assert torch.equal(value, trainer.network.get_buffer(name))


def test_without_average_the_network_is_its_own():
    trainer = make_trainer(average=False)
    trainer.advance()
    assert trainer.averaged is trainer.network
    assert not any(name.startswith("averaged.") for name in trainer.state())


# sqrt has an infinite slope at zero, where its value is fine.
BAD = {
    "nan": lambda total: total * float("nan"),
    "inf": lambda total: total * float("inf"),
    "minus inf": lambda total: total * float("-inf"),
    "a gradient alone": lambda total: (total * 0).sqrt(),
}


@pytest.mark.parametrize("name", BAD)
def test_a_step_whose_loss_or_gradient_is_not_finite_is_not_taken(name):
    network = nn.Linear(2, 1)
    trainer = Trainer(
        network, torch.optim.SGD(network.parameters(), lr=1.0), lambda step: iter([BAD[name](network.weight.sum())])
    )
    before = copy.deepcopy(network.state_dict())
    assert not math.isfinite(trainer.advance())
    assert trainer.step == 0
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def one_weight(**options):
    """A weight whose gradient is 100 at every step: its path shows the learning rate and the clipping."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    return Trainer(
        network, torch.optim.SGD(network.parameters(), lr=1.0), lambda _: iter([100 * network.weight.sum()]), **options
    )


def path(trainer, steps):
    found = []
    for _ in range(steps):
        before = trainer.network.weight.item()
        trainer.advance()
        found.append(before - trainer.network.weight.item())
    return found


def test_warm_up_and_clipping():
    found = path(one_weight(), WARM_UP_STEPS + 5)
    wanted = [CLIP_NORM * min(1.0, (step + 1) / WARM_UP_STEPS) for step in range(WARM_UP_STEPS + 5)]
    # Differences of numbers near 50 in float32.
    assert found == pytest.approx(wanted, abs=1e-4)


def test_without_clipping_steps_are_whole_from_the_first():
    assert path(one_weight(clip=False), 3) == pytest.approx([100.0] * 3)


def test_cosine_falls_to_zero_and_stays_there():
    found = path(one_weight(clip=False, cosine_steps=10), 12)
    wanted = [100 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / 10))) for step in range(12)]
    assert found == pytest.approx(wanted, abs=1e-3)


def test_moments_come_back_in_the_weights_own_memory_format():
    """A U-Net on a GPU has its weights in channels_last; fused steps would mix up moments that lie otherwise."""

    def make():
        torch.manual_seed(0)
        network = nn.Conv2d(3, 5, (4, 2)).to(memory_format=torch.channels_last)
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
        return Trainer(network, optimizer, lambda step: iter([network(x + step).square().mean()]))

    whole, first, second = make(), make(), make()
    losses = [whole.advance() for _ in range(6)]
    for _ in range(3):
        first.advance()
    second.restore({name: value.clone(memory_format=torch.contiguous_format) for name, value in first.state().items()}, 3)
    weight = second.network.weight
    assert second.optimizer.state[weight]["exp_avg"].stride() == weight.stride()
    assert [second.advance() for _ in range(3)] == losses[3:]


def test_a_stream_is_opened_once_and_anew_where_steps_do_not_follow():
    opened = []

    def items(step):
        opened.append(step)
        while True:
            yield step
            step += 1

    stream = Stream(items)
    assert [stream.at(step) for step in (3, 4, 4, 5, 9, 10)] == [3, 4, 4, 5, 9, 10]
    assert opened == [3, 9]


def test_a_stream_that_broke_is_opened_anew():
    """Memory may run out while a batch is made ready; the same step is asked for again with half as much."""
    fails = [4]

    def items(step):
        while True:
            if step in fails:
                raise torch.OutOfMemoryError("no room")
            yield step
            step += 1

    stream = Stream(items)
    assert stream.at(3) == 3
    with pytest.raises(torch.OutOfMemoryError):
        stream.at(4)
    fails.clear()
    assert [stream.at(4), stream.at(4), stream.at(5)] == [4, 4, 5]
