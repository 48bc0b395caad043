"""Batches of prompts taken apart and put together: every row keeps its ids, marks, padding and images."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kosmosg.batches import AlignmentBatch, InstructionBatch, ReadReport
from kosmosg.image_processing import ClipImageTransform
from kosmosg.prompt import EncodedPrompt, PromptBatch, PromptEncoder
from kosmosg.tokenizer import Tokenizer
from tests import tiny

PAD = 1
SIDE = 8


@pytest.fixture
def rows(tiny_tokenizer: Path) -> list[EncodedPrompt]:
    """Without image, with two next to each other, with one: lengths all different, images all different."""
    encoder = PromptEncoder(Tokenizer.from_pretrained(tiny_tokenizer), ClipImageTransform(SIDE), tiny.IMAGE_TOKENS)
    images = [torch.full((3, SIDE, SIDE), float(number)) for number in range(3)]
    return [encoder(["a red fish"]), encoder(["a", images[0], images[1], "dog"]), encoder([images[2], "at night"])]


@pytest.fixture
def batch(rows: list[EncodedPrompt]) -> PromptBatch:
    return PromptBatch.stack(rows, PAD)


def unstack(batch: PromptBatch) -> list[EncodedPrompt]:
    """Rows by the tensors alone, images by the marks of the mask."""
    assert batch.ids.shape == batch.image_mask.shape == batch.padding.shape
    assert (batch.ids[batch.padding] == PAD).all() and not batch.image_mask[batch.padding].any()
    images, found = iter(() if batch.images is None else batch.images), []
    for ids, mask, padding in zip(batch.ids, batch.image_mask, batch.padding, strict=True):
        count = int(mask.sum()) // tiny.IMAGE_TOKENS
        found.append(EncodedPrompt(ids[~padding], mask[~padding], [next(images) for _ in range(count)]))
    assert not list(images)
    assert batch.lengths == [len(row) for row in found]
    assert batch.images_per_row == [len(row.images) for row in found]
    return found


def assert_same(found: list[EncodedPrompt], expected: list[EncodedPrompt]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.ids, other.ids) and torch.equal(one.image_mask, other.image_mask)
        assert len(one.images) == len(other.images) and all(map(torch.equal, one.images, other.images))


def test_stacked_rows_are_the_rows(rows, batch):
    assert_same(unstack(batch), rows)
    assert batch.ids.dtype == torch.int64 and batch.ids.shape[1] == max(map(len, rows)) and batch.pad_id == PAD
    longer = PromptBatch.stack(rows, PAD, length=40)
    assert_same(unstack(longer), rows)
    assert longer.ids.shape == (3, 40)
    with pytest.raises(ValueError, match="no prompts"):
        PromptBatch.stack([], PAD)


def test_texts_may_be_lists_without_a_mask(rows):
    texts = [EncodedPrompt([0, 5, 6], None, []), EncodedPrompt([0, 7], None, [])]
    batch = PromptBatch.stack(texts, PAD)
    assert batch.ids.tolist() == [[0, 5, 6], [0, 7, PAD]] and batch.padding.tolist() == [
        [False] * 3,
        [False, False, True],
    ]
    assert batch.images is None and not batch.image_mask.any() and batch.images_per_row == [0, 0]
    mixed = PromptBatch.stack([texts[0], rows[2]], PAD)
    assert torch.equal(unstack(mixed)[0].ids, torch.tensor([0, 5, 6]))
    assert_same(unstack(mixed)[1:], rows[2:])


def test_what_the_host_keeps_follows_from_the_tensors(batch):
    derived = PromptBatch(batch.ids, batch.image_mask, batch.images, batch.padding)
    assert (derived.lengths, derived.images_per_row) == (batch.lengths, batch.images_per_row)


@pytest.mark.parametrize("index", [[0], [1], [2, 0], [2, 1, 0], [1, 1, 2], [0, 0]])
def test_some_rows_come_with_their_images(rows, batch, index):
    some = batch.rows(index)
    assert_same(unstack(some), [rows[row] for row in index])
    assert some.ids.shape[1] == max(len(rows[row]) for row in index)
    assert (some.images is None) == (not any(rows[row].images for row in index))


@pytest.mark.parametrize("first, second", [([0], [1, 2]), ([1, 2], [0]), ([0], [0]), ([2], [1])])
def test_joined_batches_are_their_rows_one_after_the_other(rows, batch, first, second):
    joined = batch.rows(first).join(batch.rows(second))
    assert_same(unstack(joined), [rows[row] for row in first + second])


def test_other_images_come_to_the_same_places(rows, batch):
    replaced = batch.replace_images(batch.images.flip(0))
    assert_same(unstack(replaced)[:1], rows[:1])
    assert [float(row.images[0][0, 0, 0]) for row in unstack(replaced)[1:]] == [2.0, 0.0]
    assert torch.equal(replaced.ids, batch.ids) and torch.equal(batch.images[:, 0, 0, 0], torch.arange(3.0))


def test_a_batch_moves_whole_and_is_pickled_whole(rows, batch):
    moved = batch.to("meta")
    assert {
        moved.ids.device.type,
        moved.image_mask.device.type,
        moved.images.device.type,
        moved.padding.device.type,
    } == {"meta"}
    # What the host keeps divides a batch without waiting for the device.
    assert moved.rows([2, 1]).images.shape == (3, 3, SIDE, SIDE) and moved.rows([0]).images is None
    assert_same(unstack(pickle.loads(pickle.dumps(batch))), rows)


def test_rows_of_a_micro_batch_keep_what_is_theirs(rows, batch):
    targets = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    report = ReadReport(samples=["a", "b", "c"], reads=4)
    micro_batch = InstructionBatch(prompt=batch, targets=targets, indices=[30, 31, 32], report=report)
    some = micro_batch.rows([2, 0])
    assert isinstance(some, InstructionBatch) and len(some) == 2
    assert_same(unstack(some.prompt), [rows[2], rows[0]])
    assert some.indices == [32, 30] and some.targets[:, 0, 0, 0].tolist() == [2.0, 0.0]
    assert micro_batch.indices == [30, 31, 32] and len(micro_batch) == 3
    unnumbered = replace(AlignmentBatch(prompt=batch, text_ids=torch.arange(6).view(3, 2)), indices=[])
    assert unnumbered.rows([1]).text_ids.tolist() == [[2, 3]] and unnumbered.rows([1]).indices == []
