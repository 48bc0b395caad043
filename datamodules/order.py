"""The order of training samples: a pure function of (seed, global row), on any number of ranks and workers.

**Lanes.** The rows of a run are dealt out to `L` lanes, `lane_rows` at a time, so that a reader that serves some lanes
reads some shards in sequence, and none of the others'. In each lane a seeded mixture says which source a row is from.

**Windows and blocks.** Each epoch, a source shuffles its shards and cuts the list by samples into `L` equal ranges. A
lane walks its range in windows of `w` shards; a window is cut into blocks that take an equal slice of each of its
shards; the samples of a block are shuffled. A source of at most `w` shards is one block, shared by all lanes: a full
shuffle. Every sample comes once an epoch.
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
    """Integers → 64 well-mixed bits (splitmix64, Steele et al. 2014, chained)."""
    state = 0
    for value in values:
        state = (state ^ (value & MASK)) + STEP & MASK
        state = (state ^ state >> 30) * MIX_1 & MASK
        state = (state ^ state >> 27) * MIX_2 & MASK
        state ^= state >> 31
    return state


def shuffled(n: int, *key: int) -> np.ndarray:
    """0 … n-1 in an order that the key determines, on every platform and in every version of NumPy."""
    state = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(STEP) + np.uint64(mix(*key))
    state = (state ^ state >> np.uint64(30)) * np.uint64(MIX_1)
    state = (state ^ state >> np.uint64(27)) * np.uint64(MIX_2)
    return np.argsort(state ^ state >> np.uint64(31), kind="stable")


class Draw(NamedTuple):
    """What a place in the order asks for: row `row` (from 0, without end) of `source` in `lane`."""

    source: int
    lane: int
    row: int


class Mixture:
    """Global row → draw. In each lane, blocks of the weights' sum times `repeats` turns give every source exactly
    `weight` × `repeats` turns, each block in an order of its own.

    Args:
        weights: whole shares, e.g. 2:2:1 (paper section 3.1).
        lane_rows: consecutive rows of one lane.
        rows_per_turn: consecutive rows of a lane that one draw of a source decides; 1 mixes row by row.
        repeats: how often the weights go into a block; the longer it is, the more turns look like independent draws.

    Raises:
        ValueError: no source, or a weight that is not a positive integer.
    """

    def __init__(
        self, seed: int, weights: Sequence[int], lanes: int, lane_rows: int, rows_per_turn: int = 1, repeats: int = 1
    ):
        common = math.gcd(*weights) or 1
        self.seed, self.weights = seed, tuple(weight // common for weight in weights)
        if not weights or min(weights) < 1 or sum(self.weights) * repeats > LARGEST_BLOCK:
            raise ValueError(
                f"the weights of the sources are {list(weights)} (data.<source>.weight); allowed: whole numbers above "
                f"0 whose sum, without a common factor, is at most {LARGEST_BLOCK // repeats:,}."
            )
        self.lanes, self.lane_rows, self.rows_per_turn = lanes, lane_rows, rows_per_turn
        self.turns = [weight * repeats for weight in self.weights]
        self._sources = np.repeat(np.arange(len(weights)), self.turns)
        self._block = lru_cache(maxsize=max(64, 2 * lanes))(self._shuffled_block)

    def __call__(self, position: int) -> Draw:
        """What is at global row `position` (from 0, without end)."""
        turn, row = divmod(position, self.lane_rows)
        place, lane = divmod(turn, self.lanes)
        place = place * self.lane_rows + row
        if len(self.turns) == 1:
            return Draw(0, lane, place)
        turn, row = divmod(place, self.rows_per_turn)
        block, slot = divmod(turn, len(self._sources))
        sources, earlier = self._block(lane, block)
        source = sources[slot]
        return Draw(source, lane, (block * self.turns[source] + earlier[slot]) * self.rows_per_turn + row)

    def _shuffled_block(self, lane: int, block: int) -> tuple[list[int], list[int]]:
        """Source of each turn of a block, and how many turns of it come earlier there."""
        sources = self._sources[shuffled(len(self._sources), self.seed, 1, lane, block)]
        earlier = np.zeros_like(sources)
        for source, turns in enumerate(self.turns):
            earlier[sources == source] = np.arange(turns)
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
    """Samples that are shuffled together: those of all slices, in the order `shuffled(sum of the slices, *key)`.

    `window`: all shards of the window, `following`: those of the lane's next one.
    """

    slices: tuple[Slice, ...]
    key: tuple[int, ...]
    window: tuple[int, ...]
    following: tuple[int, ...]

    def __len__(self) -> int:
        return sum(part.end - part.begin for part in self.slices)


class SampleOrder:
    """Sample number `n` of a lane (from 0, without end) → a block, and the sample's place in it.

    Args:
        counts: samples of each shard.
        lanes: L.
        window: w, shards.
        block: samples of a block, about.

    Raises:
        ValueError: no sample, or a number below 1.
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
        self._forget()

    def __call__(self, lane: int, number: int) -> tuple[Block, int]:
        """The block of sample `number` of a lane, and its place there before shuffling."""
        if self.one_block:
            # As if the lanes dealt out one sequence: with this source alone, its samples come in the order of rows.
            turn, row = divmod(number, self.lane_rows)
            epoch, place = divmod((turn * self.lanes + lane) * self.lane_rows + row, self.total)
            return self._whole(epoch), place
        begin, end = lane * self.total // self.lanes, (lane + 1) * self.total // self.lanes
        epoch, place = divmod(number, end - begin)
        window = self._windows.get(lane)
        if window is None or window.epoch != epoch or not window.begin <= place < window.end:
            window = self._windows[lane] = self._window(lane, epoch, begin, end, place)
        block = int(np.searchsorted(window.bounds, place, side="right")) - 1
        return window.blocks[block], place - int(window.bounds[block])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in the epoch's order, and how many samples come before each."""
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
        last = int(np.searchsorted(before, end, side="left"))  # of the lane's shards, excluded

        def shards(number: int) -> range:
            low = first + number * self.window
            return range(min(low, last), min(low + self.window, last))

        parts = [
            Slice(
                int(order[i]),
                int(max(begin - before[i], 0)),
                int(min(end, before[i + 1]) - before[i]),
            )
            for i in shards(number)
        ]
        parts = [part for part in parts if part.end > part.begin]
        total = sum(part.end - part.begin for part in parts)
        count = -(-total // self.block)
        following = shards(number + 1)
        if not following:  # the lane's first shards of the next epoch
            after, before_after = self._order(epoch + 1)
            low = int(np.searchsorted(before_after, begin, side="right")) - 1
            high = int(np.searchsorted(before_after, end, side="left"))
            ahead = tuple(int(after[i]) for i in range(low, min(low + self.window, high)))
        else:
            ahead = tuple(int(order[i]) for i in following)
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
            blocks.append(Block(tuple(piece for piece in slices if piece.end > piece.begin), key, window, ahead))
        start = max(int(before[first + number * self.window]) - begin, 0)
        bounds = start + np.concatenate([[0], np.cumsum([len(block) for block in blocks])])
        return _Window(epoch, start, start + total, blocks, bounds)

    def _forget(self) -> None:
        self._windows: dict[int, _Window] = {}
        self._order = lru_cache(maxsize=3)(self._epoch)
        self._whole = lru_cache(maxsize=3)(self._whole_block)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget()


class _Window(NamedTuple):
    epoch: int
    begin: int
    end: int
    blocks: list[Block]
    bounds: np.ndarray


def whole_weights(shares: Sequence[float], total: int = 1000) -> list[int]:
    """Shares → whole weights of about `total` together, each at least 1.

    Raises:
        ValueError: a share that is not above 0.
    """
    if not shares or min(shares) <= 0:
        raise ValueError(f"shares {list(shares)} must all be above 0.")
    return [max(1, round(total * share / sum(shares))) for share in shares]
