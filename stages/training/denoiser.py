"""Which denoiser a run trains, whether it fits memory, and everything that takes part in training it."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from stages.diffusion.denoiser import Denoiser
from stages.diffusion.denoisers import FACTORED, MLP, PAPER, SMALL, UNETS, resolve
from stages.diffusion.denoising import step_draws
from stages.diffusion.schedule import EPSILON, NoiseSchedule, make_schedule
from stages.foundation.background import read_ahead
from stages.foundation.errors import TryAgainError
from stages.foundation.files import available_memory
from stages.foundation.processes import local_count
from stages.foundation.seeds import global_seed
from stages.run_directory.pipeline import AUTO
from stages.run_directory.project import Project
from stages.store.reader import StoreReader, field_widths
from stages.training.batches import TrainingBatches, free_on_gpu
from stages.training.denoising_steps import DenoisingSteps, Ready, Tune
from stages.training.encoders import build_denoiser, described_encoders
from stages.training.memory import operations, parameters, training_bytes
from stages.training.ranks import Ranks
from stages.training.trainer import Trainer

STAGE = "train-diffusion"
FLOAT32, BFLOAT16 = "float32", "bfloat16"
# The `paper` preset is taken where it fits with as many deltas at once.
WORTH_A_GPU = 16
# On a CPU a U-Net gains nothing from more at once.
MOST_ON_CPU = 16
# Of the free memory, what a training is planned to take: the estimate does not know the libraries' own workspaces, and on a GPU
# the store may lie beside it.
MEMORY_SHARE, GPU_MEMORY_SHARE = 0.85, 0.6


@dataclass(frozen=True)
class Choice:
    """A denoiser with every `auto` decided.

    Attributes:
        project: the project.
        description: what `make_denoiser` needs, and the schedule; kept beside the weights.
        lr: learning rate.
        batch_size: deltas a step.
        half: bfloat16 autocast.
    """

    project: Project
    description: dict[str, Any]
    lr: float
    batch_size: int
    half: bool

    @property
    def settings(self) -> dict[str, Any]:
        """What the `auto` settings stand for."""
        shapes = ("shape", "fields", "encoders", "schedule")
        kept = {key: value for key, value in self.description.items() if key not in shapes}
        return {**kept, "lr": self.lr, "batch_size": self.batch_size, "precision": BFLOAT16 if self.half else FLOAT32}

    @cached_property
    def sketch(self) -> Denoiser:
        """The denoiser without memory: shapes alone."""
        with torch.device("meta"):
            return build_denoiser(self.project, self.description)

    @cached_property
    def parameters(self) -> int:
        """How many it has."""
        return parameters(self.sketch)

    @cached_property
    def operations(self) -> int:
        """Multiplications of one sample's pass."""
        return operations(self.sketch)

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule."""
        rows, columns = self.description["shape"]
        return make_schedule(self.description["schedule"], rows * columns, self.description["prediction"])


def choose_denoiser(project: Project, store: dict[str, Any], settings: Mapping[str, Any], device: torch.device) -> Choice:
    """Decide every `auto` of `[train-diffusion]`.

    Args:
        project: the project.
        store: its description in collect's manifest.
        settings: the table's, by name; those of unfinished work have been decided before.
        device: where it is to train.

    Raises:
        SettingsError: settings that do not go together, encoders of fields that do not exist.
    """
    arrays, fields = store["arrays"], store["fields"]
    shape = tuple(arrays["delta"]["shape"][1:])
    half = device.type == "cuda" if settings["precision"] == AUTO else settings["precision"] == BFLOAT16
    shapes = {
        "shape": list(shape),
        "fields": field_widths(store),
        "schedule": settings["schedule"],
    }
    if encoders := described_encoders(project, arrays, fields):
        shapes["encoders"] = encoders

    def made(preset: str) -> Choice:
        decided = resolve({**settings, "preset": preset}, shape)
        lr, batch_size = decided.pop("lr"), decided.pop("batch_size")
        return Choice(project, {**decided, **shapes}, lr, batch_size, half)

    if settings["preset"] != AUTO:
        return made(settings["preset"])
    if device.type == "cuda":
        found = made(PAPER)
        if training_bytes(found.sketch, WORTH_A_GPU, half) <= free_memory(device):
            return found
    return made(MLP)


def free_memory(device: torch.device) -> int:
    """Bytes a training on this device may take; much, where the system does not tell."""
    if device.type == "cuda":
        return int(GPU_MEMORY_SHARE * free_on_gpu(device))
    available = available_memory()
    return 2**63 if available is None else int(MEMORY_SHARE * available) // local_count()


def micro_batch(choice: Choice, size: int, setting: int | str, device: torch.device) -> int:
    """Deltas whose activations are in memory at once.

    Args:
        choice: the denoiser.
        size: of a batch.
        setting: of `micro_batch_size`.
        device: where it trains.

    Raises:
        TryAgainError: they do not fit; with the figures, and what would.
    """
    free = free_memory(device)
    if setting != AUTO:
        wanted = min(size, setting)
    elif device.type == "cpu" and choice.description["preset"] in UNETS:
        wanted = min(size, MOST_ON_CPU)
    else:
        wanted = size
    while wanted > 1 and setting == AUTO and training_bytes(choice.sketch, wanted, choice.half) > free:
        wanted = -(-wanted // 2)
    if (needed := training_bytes(choice.sketch, wanted, choice.half)) > free:
        raise TryAgainError(
            f"training preset {choice.description['preset']} of width {choice.description['width']} on deltas of "
            f"{'×'.join(map(str, choice.description['shape']))} takes about {needed:,} bytes of memory with {wanted} at once; "
            f"{free:,} may be taken",
            _what_fits(choice, free),
        )
    return wanted


def _what_fits(choice: Choice, free: int) -> str:
    """Settings that would fit, ready to paste."""
    table = choice.project.settings.train_diffusion.model_dump()
    shape, preset, width = tuple(choice.description["shape"]), choice.description["preset"], choice.description["width"]
    kept = {key: choice.description[key] for key in ("shape", "fields", "schedule", "encoders") if key in choice.description}
    auto = dict.fromkeys(("width", "blocks", "multipliers", "attention_max_tokens", "pad_to", "dropout"), AUTO)
    if table["prediction"] == EPSILON:
        auto["prediction"] = AUTO
    fewer = {} if table["micro_batch_size"] == AUTO else {"micro_batch_size": AUTO}
    # Widths are even, and at least 8.
    narrower = [width // part for part in (2, 4) if preset in UNETS and width % (2 * part) == 0 and width >= 8 * part]
    trials = [fewer] if fewer else []
    trials += [{"preset": preset, "width": less} for less in narrower]
    trials += [{"preset": other, **auto} for other in (SMALL, FACTORED, MLP) if other != preset]
    found = []
    for trial in trials:
        settings = {**table, "preset": preset, **trial, **fewer}
        sketch = Choice(choice.project, {**resolve(settings, shape), **kept}, 0.0, 1, choice.half).sketch
        if training_bytes(sketch, 1, choice.half) <= free:
            # Those that differ from what ocd.toml has: it is to be pasted beside that.
            changed = {key: settings[key] for key in {**trial, **fewer} if settings[key] != table[key]}
            found.append(" ".join(f"--set {STAGE}.{key}={value}" for key, value in changed.items()))
    return f"these fit: {'; '.join(found[:3])}" if found else "no preset fits this layer here: choose a smaller one"


@dataclass(frozen=True)
class Training:
    """What takes part in training a denoiser.

    Attributes:
        rows: what it learns from.
        denoiser: the network.
        steps: its losses.
        trainer: takes the steps.
    """

    rows: TrainingBatches
    denoiser: Denoiser
    steps: DenoisingSteps
    trainer: Trainer

    def blame(self) -> str:
        """The samples whose loss is worst in the last batch, for a message."""
        return self.rows.blame(*self.steps.errors())


def begin_training(
    choice: Choice,
    reader: StoreReader,
    micro: int,
    device: torch.device,
    ranks: Ranks,
    smaller: Callable[[int], None],
    tuning: Tune | None = None,
) -> Training:
    """Make everything anew, as it is before the first step.

    Args:
        choice: the denoiser.
        reader: the store.
        micro: deltas in memory at once.
        device: where it trains.
        ranks: the processes that share each batch.
        smaller: hears of a micro-batch that had to be halved.
        tuning: as `DenoisingSteps`.
    """
    project, settings = choice.project, choice.project.settings.train_diffusion
    wanted = {"held_out": settings.held_out, "batch_size": choice.batch_size, "memory": settings.store_memory}
    rows = TrainingBatches(reader, deltas=True, seed=project.seed, device=device, **wanted)
    denoiser = _new_denoiser(choice, rows, device)
    steps = DenoisingSteps(
        denoiser,
        choice.schedule,
        lambda step: read_ahead(_ready(choice, rows, ranks, step, device)),
        batch_size=rows.batch_size,
        micro_batch=micro,
        half=choice.half,
        ranks=ranks,
        seed=project.seed,
        smaller=smaller,
        tuning=tuning,
        tune_after=settings.tune_after,
    )
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=choice.lr, weight_decay=0.0, fused=True)
    cosine = settings.max_steps if settings.lr_schedule == "cosine" else None
    trainer = Trainer(denoiser, optimizer, steps, cosine_steps=cosine, ranks=ranks)
    if settings.compile:
        # After the trainer has made its copy, which is judged as it is.
        denoiser.compile()
    return Training(rows, denoiser, steps, trainer)


def _new_denoiser(choice: Choice, rows: TrainingBatches, device: torch.device) -> Denoiser:
    with global_seed(choice.project.seed, STAGE, "network"):
        denoiser = build_denoiser(choice.project, choice.description, begin=True)
    denoiser.encoder.normalise.fit(rows.parts())
    denoiser.encoder.noise = choice.project.settings.train_diffusion.conditioning_noise
    if device.type == "cuda" and choice.description["preset"] in UNETS:
        return denoiser.to(device, memory_format=torch.channels_last)
    return denoiser.to(device)


def _ready(choice: Choice, rows: TrainingBatches, ranks: Ranks, step: int, device: torch.device) -> Iterator[Ready]:
    """This rank's share of each batch from a step on, of tuning that of its first rows; made in a thread of its own."""
    settings = choice.project.settings.train_diffusion
    on_deltas = max(0, settings.tune_after - step) if settings.tune_after else None
    yield from itertools.islice(_shares(choice, rows, ranks.share(rows.batch_size), step, device), on_deltas)
    tuned = ranks.share(min(settings.tune_samples, rows.batch_size))
    yield from _shares(choice, rows, tuned, step + on_deltas, device)


def _shares(choice: Choice, rows: TrainingBatches, share: slice, step: int, device: torch.device) -> Iterator[Ready]:
    """A part of each batch from a step on, with its draws, those of the whole batch."""
    pinned = device.type == "cuda"
    if pinned:
        torch.cuda.set_device(device)
    schedule, shape = choice.schedule, tuple(choice.description["shape"])
    for batch in rows.batches(step, share):
        t, noise = step_draws(rows.batch_size, shape, schedule.steps, choice.project.seed, STAGE, step)
        t, noise = t[share], noise[share]
        yield (batch.pinned(), t.pin_memory(), noise.pin_memory()) if pinned else (batch, t, noise)
        step += 1
