"""What trainings take from a run beside its store: the model under other deltas, and what is said of neighbours."""

import dataclasses

import torch

from stages.diffusion.delta_batch import DeltaBatch
from stages.diffusion.denoisers import VECTOR
from stages.foundation.files import digest
from stages.foundation.trees import Tree, to_device, tree_map
from stages.lifecycle.branches import BRANCHES
from stages.lifecycle.context import RunContext
from stages.overfitting.batch_size import sample_bytes
from stages.overfitting.collector import make_overfitter
from stages.overfitting.overfitter import Overfitter
from stages.prediction.predictor import load_scale
from stages.run_directory.folders import folder_of
from stages.run_directory.pipeline import AUTO
from stages.store.reader import StoreReader
from stages.tasks.conditioning import fields_of
from stages.tasks.data import Split
from stages.tasks.loader import losses
from stages.tasks.views import glances_of
from stages.training.denoiser import DenoiserSettings
from stages.training.members_loss import has_energy_score, members_loss
from stages.training.retrieval import Retrieval
from stages.training.store_neighbours import AT_ONCE_BYTES, MOST_AT_ONCE, NeighbourSearch, StoreNeighbours
from stages.training.tuning import Judged, Tuning, spread

# Samples that the methods of running the model are tried on.
PROBE = 2
# Samples of a step of tuning: as few as a view of many rows, and as many as its deltas' lengths settle with.
FEWEST_TUNED, MOST_TUNED, TUNED_BYTES = 4, 64, 1 << 30
# Where the base fits everything, losses are in units of it.
SMALLEST_LOSS = 1e-12


def store_of(context: RunContext) -> StoreReader:
    """The finished delta store."""
    return StoreReader(folder_of(context.project, "collect").found, context.manifest_of("collect").store)


def overfitter_of(context: RunContext) -> Overfitter:
    """What runs the base with a weight for each sample."""
    rows = context.splits["train"]
    probe = rows.batch([i % len(rows) for i in range(PROBE)])
    collect = context.project.settings.collect
    return make_overfitter(context.task, context.base_to_overfit(), context.layer, collect, probe)


def auto_tune_samples(context: RunContext, overfitter: Overfitter) -> int:
    """Samples of a step of tuning, unless they are named: by the memory of a pass over what the task shows of one."""
    given = context.splits["train"].batch([0])
    x, of_step = (to_device(tree, context.device) for tree in (given[0], glances_of(context.task, *given, [("glance", 0)])[0]))
    table = context.project.settings.train_diffusion
    each = table.tune_members * sample_bytes(overfitter, x, of_step, factored=table.preset in (AUTO, VECTOR))
    return max(FEWEST_TUNED, min(MOST_TUNED, TUNED_BYTES // each))


def neighbour_search(context: RunContext, overfitter: Overfitter | None = None) -> NeighbourSearch | None:
    """How the neighbours of the store's rows are found; None where none are asked for. `overfitter`: if it is made already."""
    settings = context.project.settings.train_diffusion
    if not settings.neighbours:
        return None
    collected = context.manifest_of("collect")
    return NeighbourSearch(
        task=context.task,
        overfitter=overfitter or overfitter_of(context),
        split=context.splits["all"],
        reader=store_of(context),
        settings=settings,
        seed=context.seed,
        made_by=digest([collected.content, collected.identity.as_json()]),
        folder=context.project.run_path / BRANCHES,
        device=context.device,
        report=context.report,
    )


def tuning_of(
    context: RunContext,
    settings: DenoiserSettings,
    neighbours: StoreNeighbours | None,
    overfitter: Overfitter | None = None,
) -> Tuning:
    """Tuning by the task's loss, with the lengths that the scale network predicts, judged on validation samples where the run
    has such as nothing has learned from.

    Raises:
        ArtifactError: there is no scale network, or it is damaged.
    """
    reader = store_of(context)
    # Some losses are negative, such as a density's.
    sizes, overfitter = abs(reader.read("base_loss").astype(float)), overfitter or overfitter_of(context)
    if (members := settings.table.tune_members) > 1 and _is_by_distance(context, overfitter):
        # Of squared errors; the unit of other losses is about right.
        sizes **= 0.5
        context.report.message("members are tuned by the energy score of their outputs, in place of the task's loss")
    tuning = Tuning(
        task=context.task,
        scale=load_scale(context),
        overfitter=overfitter,
        split=context.splits["all"],
        sample_index=torch.from_numpy(reader.read("sample_index")),
        loss_size=max(SMALLEST_LOSS, float(sizes.mean())),
        schedule=settings.schedule,
        seed=context.seed,
        samples=settings.tune_samples,
        between=settings.tune_samples * settings.table.evaluate_steps,
        members=members,
        vectors=settings.preset == VECTOR,
    )
    return dataclasses.replace(tuning, judged=judged_on(context, overfitter, tuning.between, neighbours, members))


@torch.no_grad()
def _is_by_distance(context: RunContext, runner: Overfitter) -> bool:
    """Whether members are tuned by their distance from the label."""
    x, y = (to_device(tree, context.device) for tree in context.splits["train"].batch([0]))
    return has_energy_score(context.task, _as_member(runner.first_pass(x).output), y)


def _as_member(output: Tree) -> Tree:
    """One member's, (1, B, …)."""
    return tree_map(lambda leaf: leaf.unsqueeze(0), output)


def _unseen_split(context: RunContext) -> Split | None:
    """The validation samples, where neither the base nor the store has learned from their labels."""
    # All of train, too, holds no row of a validation set of its own.
    split = context.project.settings.collect.split
    apart = split == "train" or (split == "all" and context.validation_is_given)
    return context.splits["validation"] if apart and not context.validation_is_seen else None


@torch.no_grad()
def judged_on(
    context: RunContext, runner: Overfitter, samples: int, neighbours: StoreNeighbours | None, members: int = 1
) -> Judged | None:
    """Validation samples that tuning is judged on, where `samples` are used between two evaluations; None where something has
    learned from them."""
    if (split := _unseen_split(context)) is None:
        return None
    task, parts, total = context.task, [], 0.0
    retrieve = None if neighbours is None else Retrieval(task, runner, neighbours.bank.to(context.device), neighbours.known)
    positions = spread(len(split), samples)
    few = to_device(split.inputs(positions[:1]), context.device)
    at_once = max(1, min(MOST_AT_ONCE, AT_ONCE_BYTES // sample_bytes(runner, few, few, factored=True)))
    for part in positions.split(at_once):
        x, y = (to_device(tree, context.device) for tree in split.batch(part))
        first = runner.first_pass(x)
        fields = fields_of(task, type(context.layer.module(context.base)), x, first.output, first.captured)[0]
        parts.append(fields if retrieve is None else retrieve(x, first, fields))
        own = losses(task, first.output, y) if members == 1 else members_loss(task, _as_member(first.output), y)
        total += float(own.double().abs().sum())
    fields = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    rows = DeltaBatch(fields, torch.ones(len(positions)), numbers=positions)
    return Judged(split, rows, max(SMALLEST_LOSS, total / len(positions)))
