"""What is said of a sample's neighbours, as samples come."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.diffusion.conditioning import Fields
from stages.diffusion.neighbour_encoder import NEIGHBOURS
from stages.foundation.errors import SettingsError
from stages.foundation.trees import Tree, leaves, to_device
from stages.per_sample.capture import LAYER_INPUT
from stages.per_sample.runner import FirstPass, Runner
from stages.run_directory.descriptions import EncoderDescription, NeighboursDescription
from stages.run_directory.format import StoreDescription
from stages.store.delta_store import DELTA
from stages.tasks.neighbours import Neighbours, flat_inputs, places_of
from stages.tasks.protocol import Task
from stages.tasks.residual import residual
from stages.tasks.user_code import user_code
from stages.training.bank import MOST_DELTA_BYTES, WIDEST, Bank, identities, projection, token_width

COUNT, WHERE = "train-diffusion.neighbours", "train-diffusion.neighbours_in"
IN_COORDINATES, IN_X = "coordinates", "x"
# Places of more numbers are seen through so many fixed random projections.
WIDEST_PLACE, PROJECTED_PLACE = 4096, 512


@dataclass(frozen=True)
class Retrieval:
    """Adds to the conditioning of samples what is said of their neighbours.

    Attributes:
        runner: runs the base, with neighbours' deltas, too.
        known: how they are looked up.
    """

    task: Task
    runner: Runner
    bank: Bank
    known: NeighboursDescription

    @torch.no_grad()
    def __call__(self, x: Tree, first: FirstPass, fields: Fields) -> Fields:
        """The fields, each (B, …), and one more, `neighbours` (B, C, k), of inputs x (B, …) and the base's pass over them.

        Raises:
            SettingsError: there are not so many neighbours.
        """
        at, count = place(self.task, x, fields, self.known.where), self.known.count
        found = require_enough(self.bank.find(at, identities(x), count), count, self.bank)
        effects = caused(self.runner, self.bank, x, first, found.row) if self.known.effects else None
        return fields | {NEIGHBOURS: self.bank.tokens(fields, found, effects)}


def place(task: Task, x: Tree, fields: Mapping[str, Tensor], where: str) -> Tensor:
    """Where samples with inputs x (B, …) and conditioning (B, …) lie: (B, d) float32.

    Raises:
        SettingsError: they lie nowhere there.
        TaskError: coordinates() gives something else.
    """
    found = _place(task, x, fields, where)
    if found is None:
        why = {
            IN_COORDINATES: "the task has no coordinates()",
            IN_X: "x holds integers, whose distance means nothing",
            LAYER_INPUT: "the store has no such field",
        }
        raise SettingsError(f"{WHERE} = {where!r}, but {why[where]}", f"leave {WHERE} out, and it is chosen")
    if found.shape[1] <= WIDEST_PLACE:
        return found
    return found @ projection(found.shape[1], PROJECTED_PLACE, where).to(found)


def best_place(task: Task, x: Tree, fields: Mapping[str, Tensor]) -> str:
    """What samples are near in unless it is named: the task's coordinates, else x, which tell what the conditioning does not;
    else what the layer sees.

    Raises:
        SettingsError: nothing tells.
    """
    found = (where for where in (IN_COORDINATES, IN_X, LAYER_INPUT) if _place(task, x, fields, where) is not None)
    if (best := next(found, None)) is None:
        raise SettingsError(
            f"{COUNT}: nothing tells which samples are near: x holds integers, and there is no field {LAYER_INPUT}",
            f"give the task coordinates(), or leave {COUNT} out",
        )
    return best


def _place(task: Task, x: Tree, fields: Mapping[str, Tensor], where: str) -> Tensor | None:
    if where == IN_X:
        return flat_inputs(x)
    if where == LAYER_INPUT:
        seen = fields.get(LAYER_INPUT)
        return None if seen is None else seen.flatten(1).float()
    # On the CPU, as for the rows of evaluate: the user's code may not know of devices.
    on_cpu = to_device(x, torch.device("cpu"))
    with user_code("coordinates()"):
        if task.coordinates(on_cpu) is None:
            return None
    return places_of(task, on_cpu).to(next(iter(leaves(x).values())).device)


def caused(runner: Runner, bank: Bank, x: Tree, first: FirstPass, row: Tensor) -> Tensor:
    """What the deltas of neighbours, rows (B, k) of the bank, change the outputs of samples x (B, …) by: (B, k, numbers)."""
    changed = runner.members_along(first, x, bank.deltas(row, first.captured[LAYER_INPUT]))(1.0)
    return (changed - first.output).reshape(*changed.shape[:2], -1).transpose(0, 1).float()


def require_enough(found: Neighbours, count: int, bank: Bank) -> Neighbours:
    """Refuse fewer neighbours than are asked for.

    Raises:
        SettingsError: samples are too few, or too many are the same.
    """
    if found.row.shape[1] < count or bool(torch.isinf(found.distance).any()):
        raise SettingsError(
            f"{COUNT} = {count}, but of {len(bank):,} training samples with usable deltas some have fewer others",
            f"take fewer with --set {COUNT}=N, or collect more samples",
        )
    return found


@torch.no_grad()
def told_of_neighbours(
    task: Task, runner: Runner, store: StoreDescription, widths: Mapping[str, int], count: int, given: tuple[Tree, Tree]
) -> tuple[EncoderDescription, int, bool]:
    """The encoder of the field `neighbours`, the numbers of a residual, and whether effects are told, as a few samples (x, y)
    show."""
    device = runner.layer.weight(runner.model).device
    x, y = (to_device(tree, device) for tree in given)
    output = runner.first_pass(x).output
    error = residual(task, output, y)
    residuals = 0 if error is None else error.shape[1]
    delta = store.arrays[DELTA]
    kept = bool(delta.factors) or 4 * torch.Size(delta.shape).numel() <= MOST_DELTA_BYTES
    few = isinstance(output, Tensor) and output.is_floating_point() and output[0].numel() <= WIDEST
    effects = output[0].numel() if few and kept else 0
    width = token_width(store, widths, residuals, effects)
    return EncoderDescription(kind=NEIGHBOURS, shape=[width, count]), residuals, bool(effects)
