"""The order in which training draws the rows of a store: random but for locality, the same wherever the rows lie."""

import itertools
from collections.abc import Iterator

import numpy as np

from stages.foundation.seeds import seed_of

Rows = dict[str, np.ndarray]


class Shuffler:
    """Blocks are drawn without replacement, some of them at a time share a buffer, and its rows are drawn from it in a random
    order, which depends on the seed and the epoch alone.

    Args:
        count: rows of the store.
        block_samples: rows to a block.
        seed: of the run.
        buffer_blocks: blocks to a buffer.
        usable: (N,) bool, rows that may be drawn; None: all.
    """

    def __init__(self, count: int, block_samples: int, seed: int, buffer_blocks: int, usable: np.ndarray | None = None) -> None:
        self._count, self._block_samples = count, block_samples
        self._seed, self._buffer_blocks, self._usable = seed, buffer_blocks, usable

    def epoch(self, number: int) -> Iterator[np.ndarray]:
        """The rows of each buffer of an epoch, in the order in which they are drawn."""
        draw, each = np.random.default_rng(seed_of(self._seed, "shuffle", number)), self._block_samples
        blocks = draw.permutation(-(-self._count // each))
        for start in range(0, len(blocks), self._buffer_blocks):
            chosen = blocks[start : start + self._buffer_blocks]
            rows = np.concatenate([np.arange(b * each, min(self._count, (b + 1) * each)) for b in chosen.tolist()])
            rows = rows if self._usable is None else rows[self._usable[rows]]
            order = np.empty_like(rows)
            order[draw.permutation(len(rows))] = rows
            if len(order):
                yield order

    def endless(self, drawn: int) -> Iterator[np.ndarray]:
        """The same of one epoch after another, without the first `drawn` rows."""
        epoch, skip = divmod(drawn, self._count if self._usable is None else int(self._usable.sum()))
        for number in itertools.count(epoch):
            for rows in self.epoch(number):
                if skip < len(rows):
                    yield rows[skip:]
                skip = max(0, skip - len(rows))


def in_batches(buffers: Iterator[Rows], batch_size: int) -> Iterator[Rows]:
    """The rows of buffers, "row" being their numbers, in batches of which only the last is smaller; what a buffer leaves over
    begins the next one's first batch."""
    rest: Rows | None = None
    for buffer in buffers:
        start, count = 0, len(buffer["row"])
        if rest is not None:
            start = min(count, batch_size - len(rest["row"]))
            rest = {name: np.concatenate([rest[name], value[:start]]) for name, value in buffer.items()}
            if len(rest["row"]) < batch_size:
                continue
            yield rest
        for first in range(start, count - batch_size + 1, batch_size):
            yield {name: value[first : first + batch_size] for name, value in buffer.items()}
        last = count - (count - start) % batch_size
        rest = {name: value[last:].copy() for name, value in buffer.items()} if last < count else None
    if rest is not None:
        yield rest
