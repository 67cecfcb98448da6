"""The delta store as `evaluate` and `probe` read it: single rows, means by group, nearest directions."""

from collections.abc import Iterator
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.foundation.files import available_memory
from stages.store.reader import StoreReader

# Of the memory that is free, the part that blocks are kept in; a fixed amount where the system does not tell.
MEMORY_SHARE, MEMORY_UNKNOWN = 0.25, 1 << 30


class StoredDeltas:
    """The deltas of a finished store; those of degenerate rows read as zero."""

    def __init__(self, reader: StoreReader) -> None:
        self._reader = reader
        self.degenerate, self.rho = (torch.from_numpy(reader.read(name)) for name in ("degenerate", "rho"))
        self.sample_index = torch.from_numpy(reader.read("sample_index"))
        self.usable = torch.nonzero(~self.degenerate & (self.rho > 0)).squeeze(1)
        block = reader.block_samples * 4 * int(torch.tensor(self.shape).prod())
        most = max(1, int((available_memory() or MEMORY_UNKNOWN / MEMORY_SHARE) * MEMORY_SHARE) // block)
        self._block = lru_cache(most)(self._read_block)

    def __len__(self) -> int:
        return len(self.rho)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return tuple(self._reader.description.arrays["delta"].shape[1:])

    @property
    def mean_rho(self) -> float:
        """ρ̄ = E(ρ_s), what the paper's ablation scales all deltas by."""
        return float(self.rho[self.usable].double().mean())

    def take(self, rows: Tensor) -> Tensor:
        """Deltas of some rows, (n,) to (n, out, in); blocks are kept in memory as far as it reaches."""
        found = torch.empty(len(rows), *self.shape)
        blocks = rows // self._reader.block_samples
        for block in blocks.unique().tolist():
            here = blocks == block
            found[here] = self._block(block)[rows[here] - block * self._reader.block_samples]
        return found

    def _read_block(self, block: int) -> Tensor:
        start, stop = self._reader.span(block)
        deltas = torch.from_numpy(self._reader.read("delta", start, stop))
        deltas[self.degenerate[start:stop]] = 0
        return deltas

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every block: its row numbers (n,) and deltas (n, out, in)."""
        for block in range(self._reader.blocks):
            deltas = self._block(block)
            start = block * self._reader.block_samples
            yield torch.arange(start, start + len(deltas)), deltas

    def means(self, groups: Tensor, count: int) -> Tensor:
        """The mean delta of the usable rows of each group: groups (N,) in [0, count) to (count, out, in); zero where a group
        has none."""
        sums, sizes = torch.zeros(count, *self.shape, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        keep = torch.zeros(len(self), dtype=torch.bool)
        keep[self.usable] = True
        for rows, deltas in self.blocks():
            here = keep[rows]
            sums.index_add_(0, groups[rows][here], deltas[here].double())
            sizes.index_add_(0, groups[rows][here], torch.ones(int(here.sum()), dtype=torch.float64))
        return (sums / sizes.clamp_min(1).view(-1, 1, 1)).float()

    @cached_property
    def first_rows(self) -> Tensor:
        """The first row of each sample, in the store's order; the rows of a sample follow one another."""
        begins = torch.ones(len(self), dtype=torch.bool)
        begins[1:] = self.sample_index[1:] != self.sample_index[:-1]
        return torch.nonzero(begins).squeeze(1)

    def of_samples(self, places: Tensor) -> Tensor:
        """The mean of the deltas of some samples, which are counted as in `first_rows`: (n,) to (n, out, in)."""
        first = self.first_rows[places]
        counts = torch.cat([self.first_rows, torch.tensor([len(self)])]).diff()[places]
        if int(counts.max()) == 1:
            return self.take(first)
        return torch.stack(
            [self.take(row + torch.arange(count)).mean(0) for row, count in zip(first.tolist(), counts.tolist(), strict=True)]
        )

    @cached_property
    def mean(self) -> Tensor:
        """The mean of the usable deltas, (out, in)."""
        return self.means(torch.zeros(len(self), dtype=torch.long), 1)[0]

    def nearest_cosines(self, queries: Tensor, own: Tensor) -> Tensor:
        """The largest cosine of each query with a training delta, (Q, out, in) to (Q,); not with its own row (Q,), −1 for none,
        nor with others of that sample."""
        queries = F.normalize(queries.flatten(1).cpu(), dim=1)
        best = torch.full((len(queries),), -1.0)
        for rows, deltas in self.blocks():
            cosines = queries @ F.normalize(deltas.flatten(1), dim=1).T
            cosines[(own >= 0).view(-1, 1) & (self.sample_index[own].view(-1, 1) == self.sample_index[rows])] = -1.0
            best = torch.maximum(best, cosines.max(1).values)
        return best

    def field(self, name: str, *, vectors: bool = False) -> Tensor | None:
        """A conditioning field of all rows, (N, width), or None where the store does not have it; if `vectors`, also where it
        has more than one axis beside the sample's."""
        if name not in self._reader.field_names() or (vectors and len(self._reader.description.arrays[name].shape) > 2):
            return None
        return torch.from_numpy(self._reader.read(name)).flatten(1)
