"""Prompts as token sequences, and batches of them: taken apart and joined, a row keeps its ids, marks and images."""

import pickle
from dataclasses import replace

import pytest
import torch

from kosmosg.batches import AlignmentBatch, InstructionBatch, ReadReport
from kosmosg.image_processing import ClipImageTransform
from kosmosg.prompt import EncodedPrompt, PromptBatch, PromptEncoder, PromptTooLongError, parse_prompt
from kosmosg.tokenizer import Tokenizer
from tests import tiny

PAD = 1
SIDE = 8
IMAGES = [torch.full((3, SIDE, SIDE), float(number)) for number in range(3)]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer) -> Tokenizer:
    return Tokenizer.from_pretrained(tiny_tokenizer)


@pytest.fixture(scope="module")
def encoder(tokenizer) -> PromptEncoder:
    return PromptEncoder(tokenizer, ClipImageTransform(SIDE), tiny.IMAGE_TOKENS)


@pytest.fixture(scope="module")
def rows(encoder) -> list[EncodedPrompt]:
    """Without image, with two next to each other, with one: lengths all different, images all different."""
    return [encoder(["a red fish"]), encoder(["a", IMAGES[0], IMAGES[1], "dog"]), encoder([IMAGES[2], "at night"])]


@pytest.fixture
def batch(rows) -> PromptBatch:
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
    # What the host keeps follows from the tensors.
    derived = PromptBatch(batch.ids, batch.image_mask, batch.images, batch.padding)
    assert batch.lengths == derived.lengths == [len(row) for row in found]
    assert batch.images_per_row == derived.images_per_row == [len(row.images) for row in found]
    return found


def assert_same(batch: PromptBatch, expected: list[EncodedPrompt]) -> None:
    assert batch.ids.shape[1] >= max(map(len, expected)) and len(batch) == len(expected)
    for one, other in zip(unstack(batch), expected, strict=True):
        assert torch.equal(one.ids, other.ids) and torch.equal(one.image_mask, other.image_mask)
        assert len(one.images) == len(other.images) and all(map(torch.equal, one.images, other.images))


def test_sequence_format(encoder, tokenizer):
    encoded = encoder(["a ", IMAGES[0], " in"], eos=True)
    image = [tokenizer.image_id] * (1 + tiny.IMAGE_TOKENS) + [tokenizer.image_end_id]
    before, after = tokenizer.encode("a "), tokenizer.encode(" in")
    assert encoded.ids.tolist() == [tokenizer.bos_id, *before, *image, *after, tokenizer.eos_id]
    first = 1 + len(before) + 1
    assert encoded.image_mask.nonzero().flatten().tolist() == list(range(first, first + tiny.IMAGE_TOKENS))
    assert encoded.ids.dtype == torch.int64 and encoded.image_mask.dtype == torch.bool


def test_placeholders_become_images():
    assert parse_prompt("<i> in the suit of <i>", ["A", "B"]) == ["A", " in the suit of ", "B"]
    assert parse_prompt("a dog") == ["a dog"]


def test_errors(encoder, tokenizer, rows):
    short = PromptEncoder(tokenizer, encoder.image_transform, tiny.IMAGE_TOKENS, max_length=7)
    assert len(short([IMAGES[0]])) == 7
    twice = EncodedPrompt(rows[2].ids, rows[2].image_mask, rows[2].images * 2)
    for refused, error, told in (
        (lambda: encoder([torch.zeros(3, 9, 9)]), ValueError, r"\(3, 9, 9\) .*\(3, 8, 8\)"),
        (lambda: encoder(["a", 3]), TypeError, "int"),
        (lambda: short([IMAGES[0]] * 2), PromptTooLongError, r"13 tokens .* at most 7"),
        (lambda: encoder.collate([rows[2], twice]), ValueError, "prompt 1 has 4 image tokens for 2 images"),
        (lambda: encoder.collate([]), ValueError, "no prompts"),
        (lambda: parse_prompt("<i>", []), ValueError, "1 placeholders <i> but 0 images"),
        (lambda: parse_prompt("a dog", ["A"]), ValueError, "0 placeholders <i> but 1 images"),
    ):
        with pytest.raises(error, match=told):
            refused()


def test_stacked_rows_are_the_rows(encoder, rows, batch):
    assert_same(batch, rows)
    assert_same(encoder.collate(rows), rows)
    assert batch.ids.dtype == torch.int64 and batch.ids.shape[1] == max(map(len, rows)) and batch.pad_id == PAD
    longer = PromptBatch.stack(rows, PAD, length=40)
    assert_same(longer, rows)
    assert longer.ids.shape == (3, 40)


def test_texts_may_be_lists_without_a_mask(rows):
    texts = [EncodedPrompt([0, 5, 6], None, []), EncodedPrompt([0, 7], None, [])]
    batch = PromptBatch.stack(texts, PAD)
    assert batch.ids.tolist() == [[0, 5, 6], [0, 7, PAD]] and batch.padding[1].tolist() == [False, False, True]
    assert batch.images is None and not batch.image_mask.any() and batch.images_per_row == [0, 0]
    mixed = PromptBatch.stack([texts[0], rows[2]], PAD)
    assert unstack(mixed)[0].ids.tolist() == [0, 5, 6]
    assert_same(mixed.rows([1]), rows[2:])


@pytest.mark.parametrize("index", [[0], [2, 0], [2, 1, 0], [1, 1, 2]])
def test_some_rows_come_with_their_images_and_join_others(rows, batch, index):
    some, expected = batch.rows(index), [rows[row] for row in index]
    assert_same(some, expected)
    assert some.ids.shape[1] == max(map(len, expected))
    assert (some.images is None) == (not any(row.images for row in expected))
    for others in ([0], [2], [1, 2]):
        assert_same(some.join(batch.rows(others)), [*expected, *(rows[row] for row in others)])


def test_other_images_come_to_the_same_places(rows, batch):
    replaced = batch.replace_images(batch.images.flip(0))
    assert_same(replaced.rows([0]), rows[:1])
    assert [float(row.images[0][0, 0, 0]) for row in unstack(replaced)[1:]] == [2.0, 0.0]
    assert torch.equal(replaced.ids, batch.ids) and torch.equal(batch.images[:, 0, 0, 0], torch.arange(3.0))


def test_a_batch_moves_whole_and_is_pickled_whole(rows, batch):
    moved = batch.to("meta")
    assert all(tensor.is_meta for tensor in (moved.ids, moved.image_mask, moved.images, moved.padding))
    # What the host keeps divides a batch without waiting for the device.
    assert moved.rows([2, 1]).images.shape == (3, 3, SIDE, SIDE) and moved.rows([0]).images is None
    assert_same(pickle.loads(pickle.dumps(batch)), rows)


def test_rows_of_a_micro_batch_keep_what_is_theirs(rows, batch):
    targets = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    report = ReadReport(samples=["a", "b", "c"], reads=4)
    micro_batch = InstructionBatch(prompt=batch, targets=targets, indices=[30, 31, 32], report=report)
    some = micro_batch.rows([2, 0])
    assert isinstance(some, InstructionBatch) and len(some) == 2
    assert_same(some.prompt, [rows[2], rows[0]])
    assert some.indices == [32, 30] and some.targets[:, 0, 0, 0].tolist() == [2.0, 0.0]
    assert micro_batch.indices == [30, 31, 32] and len(micro_batch) == 3
    unnumbered = replace(AlignmentBatch(prompt=batch, text_ids=torch.arange(6).view(3, 2)), indices=[])
    assert unnumbered.rows([1]).text_ids.tolist() == [[2, 3]] and unnumbered.rows([1]).indices == []
