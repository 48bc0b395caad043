"""One batch computed in a few parts of like length, so that short prompts are not padded to the longest.

Exact where nothing reads padding: the MLLM is causal and padding stands on the right, M masks it. Rows, their order
and the loss stay those of the whole batch; under dropout the draws are others.

Shapes: `B` rows, `L` tokens, `I` images.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kosmosg.prompt import PromptBatch


class LengthGroups:
    """The parts of a batch, each cut to its own longest row.

    Args:
        groups: how many; batches of fewer rows have as many as rows. Processes that compute together must agree on it.

    Attributes:
        parts: the prompts of each group.
        rows: which rows of the batch they are.
    """

    def __init__(self, prompt: PromptBatch, groups: int):
        self.rows: list[list[int]] = [list(range(len(prompt)))]
        self.parts = [prompt]
        if groups == 1:
            return
        # On a GPU this waits for the last update, as the gradient's norm does too.
        lengths = (~prompt.padding).sum(dim=1).tolist()
        self.rows = group_by_length(lengths, min(groups, len(prompt)))
        images = image_rows(prompt)
        self.parts = [take(prompt, rows, max(lengths[row] for row in rows), images) for rows in self.rows]

    def join(self, values: Sequence[Tensor]) -> Tensor:
        """Values of the groups' rows, g×…, → those of the batch in its order, B×…"""
        if len(values) == 1:
            return values[0]
        order = torch.tensor([row for rows in self.rows for row in rows], device=values[0].device)
        return torch.cat(list(values))[order.argsort()]


def group_by_length(lengths: Sequence[int], groups: int) -> list[list[int]]:
    """Rows in exactly `groups` groups of like length, so that the groups' padded tokens together are fewest."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    longest = np.array([lengths[row] for row in order], dtype=np.int64)
    # A group best ends where the length changes; where that is too seldom, anywhere.
    ends = np.append(np.flatnonzero(np.diff(longest)), len(order) - 1) + 1
    ends = ends if len(ends) >= groups else np.arange(1, len(order) + 1)
    begins = np.append(0, ends[:-1])
    # tokens[i, j]: one group of everything from begins[i] to ends[j].
    tokens = (ends[None, :] - begins[:, None]) * longest[ends - 1][None, :]
    tokens = np.where(ends[None, :] > begins[:, None], tokens, np.iinfo(np.int64).max // 4)
    fewest, choices = tokens[0], []
    for _ in range(groups - 1):
        # What came before a group that begins at begins[i] ended at ends[i - 1].
        following = np.append(np.iinfo(np.int64).max // 4, fewest[:-1])[:, None] + tokens
        choices.append(following.argmin(axis=0))
        fewest = following.min(axis=0)
    cut, end, found = len(ends) - 1, len(order), []
    for choice in reversed(choices):
        begin = int(begins[choice[cut]])
        found.append(order[begin:end])
        cut, end = int(choice[cut]) - 1, begin
    return [order[:end], *reversed(found)]


def image_rows(prompt: PromptBatch) -> list[list[int]]:
    """For each row, which images of the batch stand in it."""
    if prompt.images is None:
        return [[] for _ in range(len(prompt))]
    slots = prompt.image_mask.sum(dim=1).tolist()
    each = sum(slots) // len(prompt.images)
    ends = np.cumsum([count // each for count in slots]).tolist()
    return [list(range(begin, end)) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def take(prompt: PromptBatch, rows: Sequence[int], length: int, images: Sequence[Sequence[int]]) -> PromptBatch:
    """Some rows of a batch with their images, cut to `length` tokens."""
    index = torch.tensor(rows, device=prompt.ids.device)
    chosen = [image for row in rows for image in images[row]]
    taken = None
    if prompt.images is not None and chosen:
        taken = prompt.images[torch.tensor(chosen, device=prompt.images.device)]
    return replace(
        prompt,
        ids=prompt.ids[index, :length],
        image_mask=prompt.image_mask[index, :length],
        padding=prompt.padding[index, :length],
        images=taken,
    )
