"""The order of training samples: a pure function of (seed, global row), for any number of ranks and workers.

**Lanes.** The rows of a run are dealt out to `L` lanes, `lane_rows` at a time. A reader serves some of the lanes and
reads only their shards, in sequence. In each lane, a seeded mixture determines the source of each row.

**Windows and blocks.** In each epoch, the shards of a source are shuffled and divided by samples into `L` equal ranges,
one per lane. A lane reads its range in windows of `w` shards. A window is divided into blocks, each with an equal slice
of every shard of the window, and the samples of a block are shuffled. A source of at most `w` shards is one block that
all lanes share, which is a full shuffle. Every sample occurs once per epoch.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

MASK = (1 << 64) - 1
STEP, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
LARGEST_BLOCK = 1_000_000


def mix(*values: int) -> int:
    """Hash integers to 64 bits (splitmix64, Steele et al. 2014, chained)."""
    state = 0
    for value in values:
        state = (state ^ (value & MASK)) + STEP & MASK
        state = (state ^ state >> 30) * MIX_1 & MASK
        state = (state ^ state >> 27) * MIX_2 & MASK
        state ^= state >> 31
    return state


def shuffled(n: int, *key: int) -> np.ndarray:
    """Permutation of 0 … n-1 determined by the key, the same on every platform and in every version of NumPy."""
    state = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(STEP) + np.uint64(mix(*key))
    state = (state ^ state >> np.uint64(30)) * np.uint64(MIX_1)
    state = (state ^ state >> np.uint64(27)) * np.uint64(MIX_2)
    return np.argsort(state ^ state >> np.uint64(31), kind="stable")


class Draw(NamedTuple):
    """Content of a global row: row `row` (counted from 0 across epochs) of `source` in `lane`."""

    source: int
    lane: int
    row: int


class Mixture:
    """Maps a global row to a source, a lane, and a row of the source in this lane.

    The sources of a lane are drawn in blocks of sum(weights) × `repeats` draws, without replacement: every block takes
    each source exactly weight × `repeats` times, in an order of its own.

    Args:
        weights: integer weight of each source, e.g. 2:2:1 (paper section 3.1).
        lane_rows: consecutive rows of one lane.
        rows_per_draw: consecutive rows of a lane that come from the same draw of a source; 1 mixes row by row.
        repeats: larger values make the draws of a block closer to independent.

    Raises:
        ValueError: no source, or a weight that is not a positive integer.
    """

    def __init__(
        self, seed: int, weights: Sequence[int], lanes: int, lane_rows: int, rows_per_draw: int = 1, repeats: int = 1
    ):
        common = math.gcd(*weights) or 1
        self.seed, self.weights = seed, tuple(weight // common for weight in weights)
        if not weights or min(weights) < 1 or sum(self.weights) * repeats > LARGEST_BLOCK:
            raise ValueError(
                f"the weights of the sources are {list(weights)} (data.<source>.weight); allowed: integers above 0 "
                f"whose sum, divided by their common factor, is at most {LARGEST_BLOCK // repeats:,}."
            )
        self.lanes, self.lane_rows, self.rows_per_draw = lanes, lane_rows, rows_per_draw
        self.draws = [weight * repeats for weight in self.weights]  # of each source in a block
        self._sources = np.repeat(np.arange(len(weights)), self.draws)
        self._block = lru_cache(maxsize=max(64, 2 * lanes))(self._shuffled_block)

    def __call__(self, position: int) -> Draw:
        """Return the draw of global row `position` (from 0, unbounded)."""
        chunk, row = divmod(position, self.lane_rows)
        chunk, lane = divmod(chunk, self.lanes)
        lane_row = chunk * self.lane_rows + row
        if len(self.draws) == 1:
            return Draw(0, lane, lane_row)
        draw, row = divmod(lane_row, self.rows_per_draw)
        block, slot = divmod(draw, len(self._sources))
        sources, earlier = self._block(lane, block)
        source = sources[slot]
        return Draw(source, lane, (block * self.draws[source] + earlier[slot]) * self.rows_per_draw + row)

    def _shuffled_block(self, lane: int, block: int) -> tuple[list[int], list[int]]:
        """Source of each draw of a block, and the number of earlier draws of the same source in the block."""
        sources = self._sources[shuffled(len(self._sources), self.seed, 1, lane, block)]
        earlier = np.zeros_like(sources)
        for source, draws in enumerate(self.draws):
            earlier[sources == source] = np.arange(draws)
        return sources.tolist(), earlier.tolist()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_block"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._block = lru_cache(maxsize=max(64, 2 * self.lanes))(self._shuffled_block)


class Slice(NamedTuple):
    """Samples `begin` … `end`-1 of a shard."""

    shard: int
    begin: int
    end: int


class Block(NamedTuple):
    """Samples that are shuffled together: those of all slices, permuted by `shuffled(len(block), *key)`.

    `window` lists all shards of the window, `following` those of the lane's next window.
    """

    slices: tuple[Slice, ...]
    key: tuple[int, ...]
    window: tuple[int, ...]
    following: tuple[int, ...]

    def __len__(self) -> int:
        return sum(part.end - part.begin for part in self.slices)


class SampleOrder:
    """Maps sample `n` of a lane (from 0, unbounded) to its block and its place in the block.

    Args:
        counts: samples of each shard.
        lanes: L.
        window: w, in shards.
        block: approximate number of samples of a block.

    Raises:
        ValueError: no sample, or an argument below 1.
    """

    def __init__(self, counts: np.ndarray, seed: int, lanes: int, lane_rows: int, window: int, block: int):
        self.counts, self.total = counts, int(counts.sum())
        if self.total < 1 or min(lanes, lane_rows, window, block) < 1:
            raise ValueError(
                f"{self.total} samples, lanes={lanes}, lane_rows={lane_rows}, window={window} and block={block} must "
                "all be at least 1."
            )
        self.seed, self.lanes, self.lane_rows, self.window, self.block = seed, lanes, lane_rows, window, block
        self.one_block = len(counts) <= window or self.total < lanes
        self._reset()

    def __call__(self, lane: int, number: int) -> tuple[Block, int]:
        """Return the block of sample `number` of a lane, and the sample's place in the shuffled block."""
        if self.one_block:
            # The lanes share one sequence, dealt out like rows. If this is the only source, global row p is sample p.
            chunk, row = divmod(number, self.lane_rows)
            epoch, place = divmod((chunk * self.lanes + lane) * self.lane_rows + row, self.total)
            return self._whole(epoch), place
        begin, end = lane * self.total // self.lanes, (lane + 1) * self.total // self.lanes
        epoch, place = divmod(number, end - begin)
        window = self._windows.get(lane)
        if window is None or window.epoch != epoch or not window.begin <= place < window.end:
            window = self._windows[lane] = self._window(lane, epoch, begin, end, place)
        block = int(np.searchsorted(window.bounds, place, side="right")) - 1
        return window.blocks[block], place - int(window.bounds[block])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in the epoch's order, and the number of samples before each."""
        order = shuffled(len(self.counts), self.seed, 2, epoch)
        return order, np.concatenate([[0], np.cumsum(self.counts[order])])

    def _whole_block(self, epoch: int) -> Block:
        shards = range(len(self.counts))
        slices = tuple(Slice(shard, 0, int(self.counts[shard])) for shard in shards)
        return Block(slices, (self.seed, 3, epoch), tuple(shards), ())

    def _window(self, lane: int, epoch: int, begin: int, end: int, place: int) -> "_Window":
        order, before = self._order(epoch)
        first = int(np.searchsorted(before, begin, side="right")) - 1
        number = (int(np.searchsorted(before, begin + place, side="right")) - 1 - first) // self.window
        stop = int(np.searchsorted(before, end, side="left"))  # one past the lane's last shard

        def shards(number: int) -> range:
            low = first + number * self.window
            return range(min(low, stop), min(low + self.window, stop))

        parts = [
            Slice(int(order[i]), int(max(begin - before[i], 0)), int(min(end, before[i + 1]) - before[i]))
            for i in shards(number)
        ]
        parts = [part for part in parts if part.end > part.begin]
        total = sum(part.end - part.begin for part in parts)
        count = -(-total // self.block)
        following = tuple(int(order[i]) for i in shards(number + 1))
        if not following:  # the lane's first shards of the next epoch
            next_order, next_before = self._order(epoch + 1)
            low = int(np.searchsorted(next_before, begin, side="right")) - 1
            high = int(np.searchsorted(next_before, end, side="left"))
            following = tuple(int(next_order[i]) for i in range(low, min(low + self.window, high)))
        window = tuple(part.shard for part in parts)
        blocks = []
        for j in range(count):
            slices = (
                Slice(
                    part.shard,
                    part.begin + (part.end - part.begin) * j // count,
                    part.begin + (part.end - part.begin) * (j + 1) // count,
                )
                for part in parts
            )
            key = (self.seed, 4, epoch, lane, number, j)
            blocks.append(Block(tuple(piece for piece in slices if piece.end > piece.begin), key, window, following))
        start = max(int(before[first + number * self.window]) - begin, 0)
        bounds = start + np.concatenate([[0], np.cumsum([len(block) for block in blocks])])
        return _Window(epoch, start, start + total, blocks, bounds)

    def _reset(self) -> None:
        self._windows: dict[int, _Window] = {}
        self._order = lru_cache(maxsize=3)(self._epoch)
        self._whole = lru_cache(maxsize=3)(self._whole_block)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._reset()


class _Window(NamedTuple):
    epoch: int
    begin: int
    end: int
    blocks: list[Block]
    bounds: np.ndarray


def integer_weights(shares: Sequence[float], total: int = 1000) -> list[int]:
    """Round shares to integer weights that sum to about `total`, each at least 1.

    Raises:
        ValueError: a share that is not above 0.
    """
    if not shares or min(shares) <= 0:
        raise ValueError(f"shares must all be above 0, got {list(shares)}.")
    return [max(1, round(total * share / sum(shares))) for share in shares]
