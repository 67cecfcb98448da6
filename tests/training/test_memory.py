"""The estimate of what training takes of memory, against what is held."""

import weakref

import pytest
import torch
from networks import describe, random, sketch
from torch.utils._python_dispatch import TorchDispatchMode

from stages.diffusion.delta_batch import DeltaBatch
from stages.diffusion.denoisers import FACTORED, MLP, PAPER, SMALL, make_denoiser
from stages.diffusion.denoising import denoising_errors, step_draws
from stages.diffusion.mlp import MlpDenoiser
from stages.diffusion.schedule import X0, make_schedule
from stages.training.memory import BYTES_PER_PARAMETER, activation_bytes, operations, parameters, training_bytes
from stages.training.trainer import Trainer

FIELDS = {"layer_input": 7, "activation": 5}


class Live(TorchDispatchMode):
    """The most bytes that tensors made meanwhile hold at one time, those of some others left out."""

    def __init__(self, besides):
        super().__init__()
        self._known, self._now, self.most = {tensor.untyped_storage()._cdata for tensor in besides}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for value in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return output

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone():
            self._known.discard(key)
            self._now -= size

        self._known.add(key)
        self._now += size
        self.most = max(self.most, self._now)
        weakref.finalize(storage, gone)


def held(denoiser, rows, half=False):
    """Bytes held at most during a training step's loss and its way back, beside the parameters."""
    schedule = make_schedule("ddpm", denoiser.shape[0] * denoiser.shape[1], denoiser.prediction)
    with Live(denoiser.parameters()) as live:
        fields = {name: torch.randn(rows, width) for name, width in FIELDS.items()}
        data = DeltaBatch(fields, torch.ones(rows), torch.randn(rows, *denoiser.shape))
        t, noise = step_draws(rows, denoiser.shape, schedule.steps, 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = denoising_errors(denoiser, schedule, data, t, noise).sum()
        loss.backward()
    denoiser.zero_grad(set_to_none=True)
    return live.most


U_NETS = {
    "small": (SMALL, (84, 120), {"width": 16}),
    "paper": (PAPER, (60, 60), {"width": 16}),
    "authors": ("authors", (60, 60), {"width": 16, "pad_to": 64, "multipliers": [1, 2, 2]}),
    # 1,600 positions attend: their matrix would be 50 times as large as what is there besides.
    "wide attention": (SMALL, (40, 40), {"width": 8, "multipliers": [1], "attention_max_tokens": 1600}),
}


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", U_NETS)
def test_estimate_of_u_nets_is_what_is_held(name, half):
    preset, shape, settings = U_NETS[name]
    torch.manual_seed(0)
    denoiser, outline = make_denoiser(describe(preset, shape, FIELDS, **settings)), sketch(preset, shape, FIELDS, **settings)
    # What each further row takes: the gradients of the parameters are there in any case.
    measured = (held(denoiser, 6, half) - held(denoiser, 3, half)) / 3
    estimate = activation_bytes(outline, half)
    # Never too little; 1.06 to 1.15 times as much has been seen: beside what is kept, three of the largest tensors are allowed.
    assert measured <= estimate <= 1.5 * measured, (estimate, measured)


@pytest.mark.parametrize("preset", [MLP, FACTORED])
def test_estimate_of_dense_networks_is_what_is_held(preset):
    denoiser = make_denoiser(describe(preset, (30, 40), FIELDS))
    # So many rows that the parameters' gradients are little beside them.
    measured = (held(denoiser, 1000) - held(denoiser, 500)) / 500
    # The deltas and what is made of them are most of it; one of their size is allowed beside those that were found.
    assert measured <= activation_bytes(sketch(preset, (30, 40), FIELDS)) <= 1.2 * measured


def test_training_keeps_five_numbers_a_parameter():
    """The weights, their gradients, AdamW's two moments, the average: counted in a trainer after a step."""
    denoiser = MlpDenoiser((3, 4), make_denoiser(describe(MLP, (3, 4), FIELDS, width=16)).encoder, 16, 1, X0)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-3)
    fields = {name: random(2, width) for name, width in FIELDS.items()}

    def step_loss(step):
        yield denoiser(random(2, 3, 4), torch.zeros(2, dtype=torch.long), denoiser.encode(fields)).sub(1).square().mean()

    trainer = Trainer(denoiser, optimizer, step_loss)
    trainer.advance()
    tensors = [*denoiser.parameters(), *trainer.averaged.parameters(), *(p.grad for p in denoiser.parameters())]
    tensors += [value for entry in optimizer.state.values() for value in entry.values() if value.dim()]
    kept = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert kept == BYTES_PER_PARAMETER * parameters(denoiser)


def test_estimate_of_training_is_the_sum():
    found = sketch(SMALL, (16, 16), FIELDS, width=8)
    assert training_bytes(found, 5) == 20 * parameters(found) + 5 * activation_bytes(found)


def test_operations_are_counted():
    """Of an MLP by hand: the products of its layers and of the conditioning's."""
    found = sketch(MLP, (3, 4), FIELDS, width=16, blocks=2)
    assert operations(found) == 16 * 16 + 12 * 16 + 2 * (16 * 32 + 2 * 16 * 16) + 16 * 12 + 16 * sum(FIELDS.values())
