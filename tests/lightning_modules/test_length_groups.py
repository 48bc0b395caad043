"""Groups of like length: as few padded tokens as there can be, every row once, images with their rows."""

from itertools import combinations, pairwise
from random import Random

import pytest
import torch
from lightning_modules.length_groups import LengthGroups, group_by_length

from kosmosg.prompt import PromptBatch


def padded_tokens(lengths: list[int], groups: list[list[int]]) -> int:
    return sum(len(rows) * max(lengths[row] for row in rows) for rows in groups)


def fewest(lengths: list[int], groups: int) -> int:
    """Over all ways of cutting the sorted lengths."""
    ordered, count = sorted(lengths), len(lengths)
    cuts = ([0, *inner, count] for inner in combinations(range(1, count), groups - 1))
    return min(sum((end - begin) * ordered[end - 1] for begin, end in pairwise(cut)) for cut in cuts)


@pytest.mark.parametrize("seed", range(12))
def test_no_other_grouping_has_fewer_padded_tokens(seed: int) -> None:
    source = Random(seed)
    lengths = [source.choice((3, 4, 9, 20, source.randrange(1, 60))) for _ in range(source.randrange(4, 10))]
    for groups in range(1, len(lengths) + 1):
        found = group_by_length(lengths, groups)
        assert len(found) == groups and all(found)  # processes that compute together count on it
        assert sorted(row for rows in found for row in rows) == list(range(len(lengths)))
        assert padded_tokens(lengths, found) == fewest(lengths, groups)


def test_rows_keep_their_images_and_come_back_in_order() -> None:
    slots = 3
    counts, lengths = [1, 0, 2, 1], [9, 3, 12, 6]
    padding = torch.arange(12)[None] >= torch.tensor(lengths)[:, None]
    ids = torch.arange(48).view(4, 12).masked_fill(padding, -1)
    image_mask = torch.zeros(4, 12, dtype=torch.bool)
    for row, count in enumerate(counts):
        image_mask[row, 1 : 1 + slots * count] = True
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 2, 2)
    prompt = PromptBatch(ids, image_mask, images, padding)
    groups = LengthGroups(prompt, 3)
    assert groups.rows == [[1], [3], [0, 2]] or padded_tokens(lengths, groups.rows) == fewest(lengths, 3)
    first = {0: [0], 1: [], 2: [1, 2], 3: [3]}
    for rows, part in zip(groups.rows, groups.parts, strict=True):
        longest = max(lengths[row] for row in rows)
        assert torch.equal(part.ids, ids[rows, :longest])
        expected = [image for row in rows for image in first[row]]
        assert ([] if part.images is None else part.images[:, 0, 0, 0].tolist()) == expected
        assert int(part.image_mask.sum()) == slots * len(expected)
    assert torch.equal(groups.join([part.ids[:, 0] for part in groups.parts]), ids[:, 0])


def test_one_group_is_the_batch_itself() -> None:
    ids = torch.zeros(2, 3, dtype=torch.long)
    prompt = PromptBatch(ids, ids > 0, None, ids > 0)
    groups = LengthGroups(prompt, 1)
    assert groups.parts[0] is prompt and groups.join([ids]) is ids
    assert len(LengthGroups(prompt, 5).parts) == 2
