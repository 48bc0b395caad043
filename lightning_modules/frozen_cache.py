"""What a frozen network gives for a caption, kept for the next time the same caption comes.

For small corpora that are read many times over. The least recently used states go when the room is full.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor

MEGABYTE = 1_000_000


class FrozenCache:
    """States by key, on the device they were computed on.

    Args:
        megabytes: room for them all; 0 keeps nothing.
    """

    def __init__(self, megabytes: int):
        self.room = megabytes * MEGABYTE
        self.held = 0
        self.states: OrderedDict[bytes, Tensor] = OrderedDict()

    def __call__(self, keys: Sequence[bytes], compute: Callable[[list[int]], Sequence[Tensor]]) -> list[Tensor]:
        """The states of each key.

        Args:
            compute: places in `keys` that are missing, each key once → their states.
        """
        if not self.room:
            return list(compute(list(range(len(keys)))))
        found = {key: self.states[key] for key in keys if key in self.states}
        missing = list({key: place for place, key in reversed(list(enumerate(keys))) if key not in found}.values())
        missing.sort()
        if missing:
            computed = compute(missing)
            found |= {keys[place]: states for place, states in zip(missing, computed, strict=True)}
        for key in keys:
            self._keep(key, found[key])
        return [found[key] for key in keys]

    def _keep(self, key: bytes, states: Tensor) -> None:
        if key not in self.states:
            # A row of a batch would keep the whole batch's memory alive.
            self.states[key] = states.clone()
            self.held += states.nbytes
        self.states.move_to_end(key)
        while self.held > self.room:
            self.held -= self.states.popitem(last=False)[1].nbytes


def row_keys(ids: Tensor, padding: Tensor | None = None) -> list[bytes]:
    """A key for each row of ids B×L, padding aside."""
    lengths = [ids.shape[1]] * len(ids) if padding is None else (~padding).sum(dim=1).tolist()
    return [row[:length].tobytes() for row, length in zip(ids.cpu().numpy(), lengths, strict=True)]


def padded(states: Sequence[Tensor], length: int) -> Tensor:
    """States l×D of rows of unlike lengths → B×length×D, zero at padding."""
    rows = states[0].new_zeros(len(states), length, states[0].shape[-1])
    for row, found in zip(rows, states, strict=True):
        row[: len(found)] = found
    return rows


def unpadded(hidden: Tensor, padding: Tensor) -> list[Tensor]:
    """States B×L×D → each row's own, l×D."""
    return [row[~beyond] for row, beyond in zip(hidden, padding, strict=True)]
