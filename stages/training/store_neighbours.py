"""The neighbours of a store's rows, found once and kept beside the run: both trainings read them."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from stages.diffusion.conditioning import Fields
from stages.diffusion.delta_batch import usable_split
from stages.diffusion.neighbour_encoder import NEIGHBOURS
from stages.foundation.config import TrainDiffusionTable
from stages.foundation.errors import ArtifactError, SettingsError
from stages.foundation.files import digest, remove
from stages.foundation.progress import Report
from stages.foundation.tensors import load_tensors, save_tensors
from stages.foundation.trees import Tree, to_device
from stages.overfitting.batch_size import sample_bytes
from stages.overfitting.overfitter import Overfitter
from stages.run_directory.descriptions import EncoderDescription, NeighboursDescription
from stages.run_directory.pipeline import AUTO
from stages.store.delta_store import DELTA
from stages.store.reader import StoreReader, field_widths
from stages.tasks.data import Split
from stages.tasks.neighbours import Neighbours
from stages.tasks.protocol import Task
from stages.tasks.residual import residual
from stages.training.bank import BANK_FILE, Bank, directions, identities, narrowed
from stages.training.retrieval import COUNT, best_place, caused, place, require_enough, told_of_neighbours

FOUND_FILE, KNOWN_FILE = "found.safetensors", "known.json"
QUERIES_AT_ONCE = 4096
# Samples that the base is run over at once.
AT_ONCE_BYTES, MOST_AT_ONCE = 512 << 20, 256


@dataclass(frozen=True)
class StoreNeighbours:
    """What is said of the neighbours of a store's N rows.

    Attributes:
        bank: what they are rows of; `bank_file` holds it.
        found: (N, k); row −1 of degenerate rows.
        effects: what neighbours' deltas cause, (N, k, numbers), or None.
    """

    bank: Bank
    bank_file: Path
    known: NeighboursDescription
    found: Neighbours
    effects: Tensor | None

    def tokens(self, rows: Tensor, fields: Fields) -> Tensor:
        """Of some rows (B,) with their conditioning (B, …): (B, C, k), on the conditioning's device."""
        device = self.bank.tensors["log_rho"].device
        own, at = {name: value.to(device) for name, value in fields.items()}, rows.to(device)
        found = Neighbours(self.found.distance[at], self.found.row[at])
        effects = None if self.effects is None else self.effects[at]
        return self.bank.tokens(own, found, effects).to(next(iter(fields.values())).device)

    def to(self, device: torch.device) -> "StoreNeighbours":
        found = Neighbours(self.found.distance.to(device), self.found.row.to(device))
        effects = None if self.effects is None else self.effects.to(device)
        return StoreNeighbours(self.bank.to(device), self.bank_file, self.known, found, effects)


@dataclass(frozen=True)
class NeighbourSearch:
    """What the neighbours of a store's rows are found with.

    Attributes:
        overfitter: runs the base.
        split: all training samples, which the store's `sample_index` counts.
        settings: how many, where, and what is held out.
        made_by: what tells the store, and the task's code, from others.
        folder: where what was found is kept.
    """

    task: Task
    overfitter: Overfitter
    split: Split
    reader: StoreReader
    settings: TrainDiffusionTable
    seed: int
    made_by: str
    folder: Path
    device: torch.device
    report: Report

    @cached_property
    def described(self) -> tuple[EncoderDescription, int, bool]:
        """The encoder of the field `neighbours`, the numbers of a residual, and whether effects are told."""
        widths, given = field_widths(self.reader.description), self.split.batch([0, len(self.split) - 1])
        if NEIGHBOURS in widths:
            raise SettingsError(
                f"{COUNT}: conditioning() gives a field named {NEIGHBOURS!r}, as the one that is to be added",
                f"give it another name, or leave {COUNT} out",
            )
        store, count = self.reader.description, self.settings.neighbours
        return told_of_neighbours(self.task, self.overfitter, store, widths, count, given)

    @cached_property
    def found(self) -> StoreNeighbours:
        """As kept, or found now.

        Raises:
            SettingsError: there are not so many, or nothing tells where samples are near.
        """
        asked = [self.made_by, self.settings.neighbours, self.settings.neighbours_in, self.settings.held_out, self.seed]
        folder = self.folder / f"neighbours-{digest(asked)[:12]}"
        try:
            return self._kept(folder)
        except ArtifactError:
            for other in self.folder.glob("neighbours-*[0-9a-f]"):
                remove(other)
        # Another training may be looking, too: who is whole first gives it the name.
        making = folder.with_name(f"{folder.name}.{os.getpid()}.wip")
        remove(making)
        making.mkdir(parents=True)
        self._find(making)
        with contextlib.suppress(OSError):
            making.rename(folder)
        remove(making)
        return self._kept(folder)

    def _kept(self, folder: Path) -> StoreNeighbours:
        known, bank = NeighboursDescription.read(folder / KNOWN_FILE), Bank.read(folder / BANK_FILE)
        tensors = load_tensors(folder / FOUND_FILE)
        found = Neighbours(tensors["distance"], tensors["row"])
        return StoreNeighbours(bank, folder / BANK_FILE, known, found, tensors.get("effects"))

    def _find(self, folder: Path) -> None:
        """Make the bank, look for every row's neighbours in it, and write both; what makes them whole is written last."""
        effects = self.described[2]
        asked, of_bank = self._rows()
        where, lying, identity, errors = self._read(asked)
        kept = {"place": lying[of_bank], "identity": identity[of_bank], **self._of_store(asked[of_bank], effects)}
        bank = Bank(kept if errors is None else kept | {"residual": errors[of_bank]})
        near = self._near(bank, lying, identity)
        spread = near.spread(asked, len(self.reader))
        tensors = {"distance": spread.distance, "row": spread.row}
        if effects:
            tensors["effects"] = self._caused(bank, asked, near.row)
        save_tensors(folder / BANK_FILE, bank.tensors)
        save_tensors(folder / FOUND_FILE, tensors)
        NeighboursDescription(count=self.settings.neighbours, where=where, effects=effects).write(folder / KNOWN_FILE)

    def _rows(self) -> tuple[Tensor, Tensor]:
        """The rows that a training draws or holds out, ascending; and which of them the bank has, the first of each sample that
        trains."""
        known = [torch.from_numpy(self.reader.read(name)) for name in ("degenerate", "rho", "sample_index")]
        train, held = usable_split(*known, self.settings.held_out, self.seed)
        samples, group = known[2][train].unique(return_inverse=True)
        first = torch.full((len(samples),), len(self.reader)).scatter_reduce(0, group, train, "amin")
        asked = torch.cat([train, held]).sort().values
        return asked, torch.isin(asked, first)

    def _batches(self, rows: Tensor) -> Iterator[tuple[Tensor, Tree, Tree]]:
        """Rows with x and y of their samples, part by part, on the device."""
        index = torch.from_numpy(self.reader.read("sample_index"))
        few = to_device(self.split.inputs(index[rows[:1]]), self.device)
        each = sample_bytes(self.overfitter, few, few, factored=True)
        for part in rows.split(max(1, min(MOST_AT_ONCE, AT_ONCE_BYTES // each))):
            x, y = (to_device(tree, self.device) for tree in self.split.batch(index[part]))
            yield part, x, y

    def _fields(self, rows: Tensor) -> Fields:
        """Their conditioning as the store has it, (n, …) each."""
        found = self.reader.take(self.reader.field_names(), rows.numpy())
        return {name: torch.from_numpy(found[name]) for name in self.reader.field_names()}

    @torch.no_grad()
    def _read(self, rows: Tensor) -> tuple[str, Tensor, Tensor, Tensor | None]:
        """What samples are near in, where they lie there, what tells equal ones, and how far the base is from their labels."""
        where, parts, numbers = self.settings.neighbours_in, [], self.described[1]
        for part, x, y in self._batches(rows):
            fields = {name: value.to(self.device) for name, value in self._fields(part).items()}
            where = best_place(self.task, x, fields) if where == AUTO else where
            # The base is run for this alone.
            error = residual(self.task, self.overfitter.first_pass(x).output, y) if numbers else None
            # Labels of some batches may have another form, such as one that is to be ignored.
            told = error is not None and error.shape[1] == numbers
            error = error.cpu() if told else torch.zeros(len(part), numbers)
            parts.append((place(self.task, x, fields, where).cpu(), identities(x), error))
        lying, same, errors = (torch.cat(values) for values in zip(*parts, strict=True))
        return where, lying, same, errors if numbers else None

    def _of_store(self, rows: Tensor, whole: bool) -> dict[str, Tensor]:
        """What the bank has from the store: conditioning, ρ, directions, and the deltas themselves, if `whole`."""
        factors = self.reader.description.arrays[DELTA].factors
        names = list(factors or [DELTA])
        parts: dict[str, list[Tensor]] = {}
        for part in rows.split(self.reader.block_samples):
            found = {name: torch.from_numpy(value) for name, value in self.reader.take(names, part.numpy()).items()}
            kept = {"conditioning": narrowed(self._fields(part)), "direction": directions(found[names[0]])}
            for name, value in (kept | ({name: found[name] for name in names} if whole else {})).items():
                parts.setdefault(name, []).append(value)
        rho = torch.from_numpy(self.reader.read("rho"))[rows]
        return {"log_rho": rho.log(), **{name: torch.cat(values) for name, values in parts.items()}}

    def _near(self, bank: Bank, at: Tensor, identity: Tensor) -> Neighbours:
        """The neighbours of samples at places (n, d)."""
        count, parts, bank = self.settings.neighbours, [], bank.to(self.device)
        for part in torch.arange(len(at)).split(QUERIES_AT_ONCE):
            found = bank.find(at[part].to(self.device), identity[part], count)
            parts.append(require_enough(Neighbours(found.distance.cpu(), found.row.cpu()), count, bank))
            self.report.progress(int(part[-1]) + 1, len(at), "neighbours")
        return Neighbours(*(torch.cat([getattr(part, name) for part in parts]) for name in ("distance", "row")))

    @torch.no_grad()
    def _caused(self, bank: Bank, rows: Tensor, near: Tensor) -> Tensor:
        """What the deltas of each row's neighbours cause for it, (N, k, numbers); zero for degenerate rows."""
        bank, done, parts = bank.to(self.device), 0, []
        for part, x, _ in self._batches(rows):
            first = self.overfitter.first_pass(x)
            parts.append(caused(self.overfitter, bank, x, first, near[done : done + len(part)].to(self.device)).cpu())
            done += len(part)
            self.report.progress(done, len(rows), "samples under their neighbours' deltas")
        found = torch.zeros(len(self.reader), *parts[0].shape[1:])
        found[rows] = torch.cat(parts)
        return found
