"""The training side that a sample's neighbours are looked up in, and what is said of each neighbour."""

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.diffusion.conditioning import Fields
from stages.diffusion.denoiser import unit
from stages.foundation.deltas import Deltas
from stages.foundation.errors import ArtifactError
from stages.foundation.no_doubles import where_doubles_are
from stages.foundation.seeds import generator
from stages.foundation.tensors import load_tensors
from stages.foundation.trees import Tree, batch_size, leaves
from stages.run_directory.format import StoreDescription
from stages.store.delta_store import DELTA, FACTORS
from stages.tasks.neighbours import Neighbours, SearchIndex

BANK_FILE = "bank.safetensors"
# A field of more numbers is seen through so many fixed random projections; labels and outputs of more are left out.
WIDEST, PROJECTED = 256, 64
# A delta that is no outer product is seen as P δ Q, so many rows and columns of it; whole deltas that take more are not kept.
SIDE, MOST_DELTA_BYTES = 8, 512 << 20


class Bank:
    """One row for each sample that trains the denoiser, N of them.

    Args:
        tensors: `place` (N, d), where a sample lies; `identity` (N,) int64, equal where x is; `conditioning` (N, w), as
            `narrowed` gives it; `direction` (N, p), of its delta, and `log_rho` (N,); `residual` (N, c), y − f(x), where it
            is a few numbers; and its delta, as `delta_output` (N, out) and `delta_input` (N, in), or as `delta` (N, out, in),
            where what it causes for others is asked for.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    @classmethod
    def read(cls, path: Path) -> "Bank":
        """Raises:
        ArtifactError: it is missing, damaged or incomplete.
        """
        bank = cls(load_tensors(path))
        if missing := {"place", "identity", "conditioning", "direction", "log_rho"} - bank.tensors.keys():
            raise ArtifactError(f"{path} lacks {', '.join(sorted(missing))}", "run: ocd train-diffusion --force")
        return bank

    def __len__(self) -> int:
        return len(self.tensors["identity"])

    def to(self, device: torch.device) -> "Bank":
        return Bank({name: value.to(device) for name, value in self.tensors.items()})

    def find(self, places: Tensor, identities: Tensor, k: int) -> Neighbours:
        """The k nearest rows of samples at places (B, d); rows of the same x do not count."""
        of_asked, of_known = map(where_doubles_are, (identities.to(places.device), self.tensors["identity"]))
        found = self._index.nearest(places, k, _equal_pairs(of_asked, of_known))
        return Neighbours(found.distance.to(places), found.row.to(places.device))

    @functools.cached_property
    def _index(self) -> SearchIndex:
        return SearchIndex(self.tensors["place"])

    def deltas(self, row: Tensor, seen: Tensor) -> Deltas:
        """The deltas of rows (B, k), as they act on samples of which the layer sees (B, …).

        Of outer products u_j h_jᵀ that is (h_j·h) u_j hᵀ/‖h‖², for the layer sees h alone.
        """
        if DELTA in self.tensors:
            return Deltas(self.tensors[DELTA][row])
        left, right = (self.tensors[name][row] for name in FACTORS)
        along = F.normalize(seen.flatten(1).to(left), dim=1)
        return Deltas(left * torch.einsum("bki,bi->bk", right, along).unsqueeze(2), along)

    def tokens(self, fields: Fields, found: Neighbours, effects: Tensor | None) -> Tensor:
        """What the networks see of the neighbours of samples with conditioning (B, …): (B, C, k).

        Of each: its distance, log ρ and direction, the difference of its conditioning, its residual, and what its delta
        changes the sample's output by, `effects` (B, k, c).
        """
        row = found.row
        parts = [found.distance.unsqueeze(2), self.tensors["log_rho"][row].unsqueeze(2), self.tensors["direction"][row]]
        parts.append(self.tensors["conditioning"][row] - narrowed(fields).unsqueeze(1))
        parts += [self.tensors["residual"][row]] if "residual" in self.tensors else []
        parts += [effects] if effects is not None else []
        return torch.cat(parts, dim=2).transpose(1, 2)


def token_width(store: StoreDescription, widths: Mapping[str, int], residual: int, effect: int) -> int:
    """Numbers of a neighbour, C, by the store, the `widths` of its fields, and the numbers of a residual and of an effect."""
    direction = store.arrays[DELTA].shape[1] if store.arrays[DELTA].factors else SIDE * SIDE
    return 2 + direction + sum(PROJECTED if width > WIDEST else width for width in widths.values()) + residual + effect


def narrowed(fields: Fields) -> Tensor:
    """Fields side by side, (B, w); a wide one through fixed projections."""
    parts = [_projected(value.flatten(1), name) for name, value in sorted(fields.items())]
    return torch.cat(parts, dim=1)


def _projected(values: Tensor, name: str) -> Tensor:
    if values.shape[1] <= WIDEST:
        return values
    return values @ projection(values.shape[1], PROJECTED, name).to(values)


@functools.lru_cache(maxsize=8)
def projection(width: int, count: int, name: str) -> Tensor:
    """A random matrix (width, count), the same whatever the run's seed: a branch with another seed may share a bank."""
    return torch.randn(width, count, generator=generator("projection", name)) / width**0.5


def directions(deltas: Tensor) -> Tensor:
    """What is said of the direction of deltas: of vectors u (B, out) these with root mean square 1; of matrices (B, out, in)
    P δ Q of unit deltas, with fixed P and Q, (B, 64)."""
    if deltas.dim() == 2:
        return unit(deltas.unsqueeze(2)).squeeze(2)
    left, right = (projection(size, SIDE, name) for size, name in zip(deltas.shape[1:], ("left", "right"), strict=True))
    return torch.einsum("boi,op,iq->bpq", unit(deltas), left, right).flatten(1)


def identities(x: Tree) -> Tensor:
    """A number for each input, (B,) int64, equal where all of their numbers are."""
    rows = [leaf.detach().cpu().reshape(len(leaf), -1).contiguous() for leaf in leaves(x).values()]
    # As bytes: numpy does not know bfloat16.
    parts = [part.view(torch.uint8).numpy() for part in rows]
    whole = (b"".join(part[i].tobytes() for part in parts) for i in range(batch_size(x)))
    digests = b"".join(hashlib.blake2b(one, digest_size=8).digest() for one in whole)
    return torch.from_numpy(np.frombuffer(digests, np.int64).copy())


def _equal_pairs(queries: Tensor, known: Tensor) -> Tensor:
    """All (i, j) with queries[i] = known[j], (P, 2)."""
    order = known.argsort(stable=True)
    low, high = (torch.searchsorted(known[order], queries, right=right) for right in (False, True))
    counts = high - low
    query = torch.repeat_interleave(torch.arange(len(queries), device=known.device), counts)
    step = torch.arange(len(query), device=known.device) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.stack([query, order[low[query] + step]], dim=1)
