"""The order of training samples: a pure function of (seed, global sample index).

Nothing is shuffled in memory and nothing is remembered: sample number 10⁹ of a run is found as quickly as the first,
so a run resumes anywhere at once, on any number of ranks and workers.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

MASK = (1 << 64) - 1
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
ROUNDS = 4
MAX_BLOCK = 1_000_000


def mix(*values: int) -> int:
    """Integers → 64 well-mixed bits (splitmix64, Steele et al. 2014, chained)."""
    state = 0
    for value in values:
        state = (state ^ (value & MASK)) + 0x9E3779B97F4A7C15 & MASK
        state = (state ^ state >> 30) * MIX_1 & MASK
        state = (state ^ state >> 27) * MIX_2 & MASK
        state ^= state >> 31
    return state


class Permutation:
    """A seeded bijection of 0 … n-1 that takes no memory: a Feistel network on a rectangle, cycle-walked.

    The rectangle rows × columns is the smallest near-square one that holds n, so about one walk in sqrt(n) steps
    outside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).

    Raises:
        ValueError: n < 1.
    """

    def __init__(self, n: int, key: int):
        if n < 1:
            raise ValueError(f"a permutation of {n} elements does not exist; n must be at least 1.")
        self.n = n
        self.rows = math.isqrt(n - 1) + 1
        self.columns = -(-n // self.rows)
        self.keys = [(mix(key, i), mix(key, i + 1)) for i in range(0, 2 * ROUNDS, 2)]

    def __call__(self, i: int) -> int:
        """Where `i` goes."""
        if not 0 <= i < self.n:
            raise IndexError(f"{i} is outside 0 … {self.n - 1}.")
        rows, columns = self.rows, self.columns
        while True:
            row, column = divmod(i, columns)
            for even, odd in self.keys:  # written out: a call for each round would double the time of the order
                mixed = (column ^ even) * MIX_1 & MASK
                row = (row + ((mixed ^ mixed >> 29) * MIX_2 >> 11 & MASK)) % rows
                mixed = (row ^ odd) * MIX_1 & MASK
                column = (column + ((mixed ^ mixed >> 29) * MIX_2 >> 11 & MASK)) % columns
            i = row * columns + column
            if i < self.n:
                return i


class Draw(NamedTuple):
    """One place in the order: element `index` of source number `source`, `offset` places into its pass `epoch`."""

    source: int
    index: int
    epoch: int
    offset: int


class MixtureOrder:
    """Position in the run → which sample of which source.

    Positions are cut into turns of `rows_per_turn`, turns into blocks as long as the weights' sum times `repeats`. Each
    block gives every source exactly `weight` × `repeats` turns, in an order of its own; each source is passed through
    in a new permutation every epoch, every element once.

    Args:
        seed: of the whole order.
        sizes: elements of each source, at least 1 each.
        weights: whole shares, e.g. 2:2:1 (paper section 3.1).
        rows_per_turn: consecutive positions that one draw of a source decides; 1 mixes row by row.
        repeats: how often the weights go into a block; the longer it is, the more turns look like independent draws.

    Raises:
        ValueError: no source, an empty source, or a weight that is not a positive integer.
    """

    def __init__(
        self, seed: int, sizes: Sequence[int], weights: Sequence[int], rows_per_turn: int = 1, repeats: int = 1
    ):
        if not sizes or len(sizes) != len(weights):
            raise ValueError(f"{len(sizes)} sizes and {len(weights)} weights: every source needs one of each.")
        if min(sizes) < 1 or min(weights) < 1 or sum(weights) * repeats > MAX_BLOCK:
            raise ValueError(
                f"sizes {list(sizes)} and weights {list(weights)} must be positive integers, the weights' sum at most "
                f"{MAX_BLOCK // repeats}; leave out a source that is not wanted."
            )
        common = math.gcd(*weights)
        self.seed, self.sizes, self.weights = seed, tuple(sizes), tuple(weight // common for weight in weights)
        self.rows_per_turn = rows_per_turn
        self.turns = [weight * repeats for weight in self.weights]
        self.block = sum(self.turns)
        self.starts = [sum(self.turns[:i]) for i in range(len(sizes))]
        self._permutations: dict[tuple[int, int, int], Permutation] = {}
        self._slots: tuple[int, Permutation] | None = None

    def __call__(self, position: int) -> Draw:
        """What stands at `position` (from 0, without end)."""
        turn, row = divmod(position, self.rows_per_turn)
        block, place = divmod(turn, self.block)
        slot = self._block(block)(place) if len(self.sizes) > 1 else place
        source = bisect_right(self.starts, slot) - 1
        drawn = (block * self.turns[source] + slot - self.starts[source]) * self.rows_per_turn + row
        epoch, offset = divmod(drawn, self.sizes[source])
        return Draw(source, self._permutation(source, epoch, 0)(offset), epoch, offset)

    def redraw(self, draw: Draw, attempt: int) -> int:
        """Another element of the same source in place of an unusable one; `attempt` counts from 1."""
        return self._permutation(draw.source, draw.epoch, attempt)(draw.offset)

    def _block(self, block: int) -> Permutation:
        if self._slots is None or self._slots[0] != block:
            self._slots = block, Permutation(self.block, mix(self.seed, 1, block))
        return self._slots[1]

    def _permutation(self, source: int, epoch: int, attempt: int) -> Permutation:
        key = (source, epoch, attempt)
        if key not in self._permutations:
            if len(self._permutations) >= 64:
                self._permutations.clear()
            self._permutations[key] = Permutation(self.sizes[source], mix(self.seed, 2, *key))
        return self._permutations[key]


def whole_weights(shares: Sequence[float], total: int = 1000) -> list[int]:
    """Shares → whole weights of about `total` together, each at least 1.

    Raises:
        ValueError: a share that is not above 0.
    """
    if not shares or min(shares) <= 0:
        raise ValueError(f"shares {list(shares)} must all be above 0.")
    return [max(1, round(total * share / sum(shares))) for share in shares]
