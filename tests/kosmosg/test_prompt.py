import pytest
import torch
from PIL import Image

from kosmosg.image_processing import ClipImageTransform
from kosmosg.prompt import EncodedPrompt, PromptBatch, PromptEncoder, PromptTooLongError, parse_prompt
from kosmosg.tokenizer import Tokenizer
from tests import tiny

RED, BLUE = Image.new("RGB", (70, 80), "red"), Image.new("RGB", (64, 64), "blue")


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return Tokenizer.from_pretrained(tiny_tokenizer)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return PromptEncoder(tokenizer, ClipImageTransform(tiny.IMAGE_SIZE), tiny.IMAGE_TOKENS)


def test_sequence_format(encoder, tokenizer):
    encoded = encoder(["a ", RED, " in"], eos=True)
    image = [tokenizer.image_id] * (1 + tiny.IMAGE_TOKENS) + [tokenizer.image_end_id]
    before, after = tokenizer.encode("a "), tokenizer.encode(" in")
    assert encoded.ids.tolist() == [tokenizer.bos_id, *before, *image, *after, tokenizer.eos_id]
    first = 1 + len(before) + 1
    assert encoded.image_mask.nonzero().flatten().tolist() == list(range(first, first + tiny.IMAGE_TOKENS))
    assert encoded.ids.dtype == torch.int64 and encoded.image_mask.dtype == torch.bool


def test_collate_pads_on_the_right_and_keeps_reading_order(encoder, tokenizer):
    batch = encoder.collate([encoder([RED, " and ", BLUE]), encoder(["a dog"]), encoder([BLUE])])
    assert len(batch) == 3 and batch.images.shape == (3, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    means = batch.images.mean(dim=(2, 3))
    assert means[0, 0] > 0 > means[0, 2] and means[1, 2] > 0 > means[1, 0]
    assert torch.equal(means[1], means[2])
    assert torch.equal(batch.padding, batch.ids == tokenizer.pad_id)
    assert not batch.padding[:, 0].any() and not batch.image_mask[batch.padding].any()
    moved = batch.to("meta")
    assert moved.ids.is_meta and moved.images.is_meta
    assert encoder.collate([encoder(["a dog"])]).to("meta").images is None


def test_errors(encoder, tokenizer):
    with pytest.raises(ValueError, match=r"\(3, 32, 32\) but must be \(3, 64, 64\)"):
        encoder([torch.zeros(3, 32, 32)])
    with pytest.raises(TypeError, match="is int"):
        encoder(["a", 3])
    short = PromptEncoder(tokenizer, encoder.image_transform, tiny.IMAGE_TOKENS, max_length=7)
    assert len(short([RED])) == 7
    with pytest.raises(PromptTooLongError, match=r"13 tokens .* at most 7"):
        short([RED, RED])
    encoded = encoder([RED])
    with pytest.raises(ValueError, match="prompt 1 has 4 image tokens for 2 images"):
        encoder.collate([encoded, EncodedPrompt(encoded.ids, encoded.image_mask, encoded.images * 2)])
    with pytest.raises(ValueError, match="no prompts"):
        encoder.collate([])


def test_parse_prompt():
    assert parse_prompt("<i> in the suit of <i>", [RED, BLUE]) == [RED, " in the suit of ", BLUE]
    assert parse_prompt("a dog") == ["a dog"]
    for text, images in (("<i>", []), ("a dog", [RED]), ("<i> and <i>", [RED])):
        with pytest.raises(ValueError, match=r"placeholders .* images were given"):
            parse_prompt(text, images)


def same(ours, theirs):
    """Batches that hold the same."""
    assert ours.lengths == theirs.lengths and ours.images_per_row == theirs.images_per_row
    for name in ("ids", "image_mask", "padding", "images"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert (one is None and other is None) or torch.equal(one, other), name


def test_batches_are_divided_and_joined_as_if_collated_so(encoder, tokenizer):
    rows = [encoder(segments) for segments in ([RED, " and ", BLUE], ["a dog"], ["a ", BLUE], ["a small dog"])]
    batch = encoder.collate(rows)
    assert batch.images_per_row == [2, 0, 1, 0] and batch.lengths == [len(row) for row in rows]
    same(PromptBatch(batch.ids, batch.image_mask, batch.images, batch.padding), batch)  # derived from the tensors
    same(batch.rows([2, 0]), encoder.collate([rows[2], rows[0]]))
    same(batch.rows([3, 1]), encoder.collate([rows[3], rows[1]]))
    same(batch.rows([1]).join(batch.rows([0, 2])), encoder.collate([rows[1], rows[0], rows[2]]))
    black = batch.replace_images(torch.zeros_like(batch.images))
    assert not black.images.any() and torch.equal(black.ids, batch.ids) and batch.images.any()
    with pytest.raises(ValueError, match="no prompts"):
        PromptBatch.stack([], tokenizer.pad_id)
