"""Rows of stage 1: documents packed in their order, pairs whole, labels of text alone."""

import itertools
from collections import Counter

import pytest
import torch

from datamodules.data_config import Source
from datamodules.language_modelling import LanguageModellingData, LanguageModellingDataConfig
from datamodules.packing import Packer
from datamodules.sample import CaptionSample, TextSample
from kosmosg.losses import IGNORED_LABEL
from tests.datamodules import worlds

T = 64


@pytest.fixture
def data(tmp_path, tiny_tokenizer):
    number = itertools.count()

    def make(text=(), captions=(), interleaved=(), length=T, **options):
        sources = {
            name: Source(worlds.write(tmp_path / str(next(number)), name, list(samples)), weight)
            for name, weight, samples in (("text", 5, text), ("captions", 5, captions), ("interleaved", 2, interleaved))
            if samples
        }
        config = LanguageModellingDataConfig(**sources, sequence_length=length, **options)
        module = LanguageModellingData(config, worlds.encoder(tiny_tokenizer))
        module.setup()
        module.measure()
        return module

    return make


def test_rows_are_mixed_five_five_two_and_labels_are_the_next_text_tokens(data):
    module = data(worlds.texts(30), worlds.captions(30), worlds.interleaved(30))
    batch, tokenizer = module.train_dataset[range(24)], module.packer.tokenizer
    assert Counter(batch.report.sources) == {"text": 10, "captions": 10, "interleaved": 4}
    ids, labels = batch.prompt.ids, batch.labels
    assert ids.shape == labels.shape == (24, T)
    assert int(batch.prompt.image_mask.sum()) == len(batch.prompt.images) * worlds.SLOTS > 0
    following, special = ids[:, 1:], ("bos_id", "pad_id", "image_id", "image_end_id")
    ignored = torch.isin(following, torch.tensor([getattr(tokenizer, name) for name in special]))
    assert torch.equal(labels[:, :-1] == IGNORED_LABEL, ignored)
    assert torch.equal(labels[:, :-1][~ignored], following[~ignored])
    assert (labels == tokenizer.eos_id).any()


def test_a_full_row_predicts_one_token_beyond_its_input(data, tiny_tokenizer):
    sentence = len(worlds.encoder(tiny_tokenizer).tokenizer.encode("the dog."))
    module = data(text=[TextSample("the dog. " * 300)], length=sentence * 10)  # <s> and ten sentences are T+1 tokens
    batch = module.train_dataset[[0]]
    assert not batch.prompt.padding.any()
    assert batch.labels[0, -1] != IGNORED_LABEL


def test_documents_follow_each_other_whole_in_their_order(data):
    module = data(text=worlds.texts(12))
    source = module.train_dataset.builders[0].source
    tokenizer = module.packer.tokenizer
    row = module.train_dataset[[0]].prompt.ids[0].tolist()
    parts, expected = tokenizer.decode(row).split("</s>"), [source(0, number).text for number in range(12)]
    assert 1 < len(parts) <= len(expected)  # several documents in the row
    for part, text in zip(parts[:-1], expected, strict=False):
        assert part.strip() == tokenizer.decode(tokenizer.encode(text))
    # the last document is cut after a whole sentence
    cut = parts[-1].strip()
    assert not cut or (expected[len(parts) - 1].startswith(cut) and cut[-1] in ".!")
    assert row[0] == tokenizer.bos_id and row.count(tokenizer.bos_id) >= row.count(tokenizer.eos_id)


def test_an_epoch_reads_every_document_about_once(data):
    """Short texts, long ones and pairs: rows begin where the ones before ended, not in every document."""
    short = [TextSample(f"fish {i}. " * (1 + i % 7)) for i in range(60)]
    long = [TextSample(f"the dog sees fish number {i}. " * (20 + 4 * (i % 5))) for i in range(12)]
    for samples, kind in ((short, "text"), (long, "text"), (worlds.captions(60), "captions")):
        module = data(**{kind: samples})
        builder = module.train_dataset.builders[0]
        rows = round(len(samples) / builder.samples_per_row)
        assert rows < len(samples) or samples is long
        learned = (module.train_dataset[range(rows)].labels != IGNORED_LABEL).sum().item()
        texts = [sample.text if kind == "text" else sample.caption for sample in samples]
        units = [unit for text in texts for unit in module.packer.sentences(text)]
        tokens = sum(len(unit.ids) for unit in units) + len(samples)
        assert 0.85 < learned / tokens < 1.1, (kind, learned, tokens)


def test_pairs_are_never_divided(data):
    module = data(captions=worlds.captions(30))
    tokenizer = module.packer.tokenizer
    for row in module.train_dataset[range(30)].prompt.ids.tolist():
        text = [i for i in row if i != tokenizer.pad_id]
        images, opened = text.count(tokenizer.image_end_id), text.count(tokenizer.bos_id)
        # the last </s> may be the one token that is only a label
        assert images == opened and opened - 1 <= text.count(tokenizer.eos_id) <= opened
        starts = [i for i, token in enumerate(text) if token == tokenizer.bos_id]
        assert all(text[i + 1] == tokenizer.image_id for i in starts)


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_captions_may_stand_before_their_image(data, probability):
    module = data(captions=worlds.captions(40), caption_first=probability)
    tokenizer = module.packer.tokenizer
    ids = module.train_dataset[range(60)].prompt.ids
    opened = ids[:, :-1] == tokenizer.bos_id
    before = (ids[:, 1:][opened] != tokenizer.image_id).float().mean()
    assert abs(before - probability) < (0.15 if probability == 0.5 else 1e-9)


def test_images_stand_in_the_order_of_their_slots(data):
    module = data(interleaved=worlds.interleaved(10))
    batch = module.train_dataset[range(6)]
    counts = (batch.prompt.image_mask.sum(1) // worlds.SLOTS).tolist()
    assert sum(counts) == len(batch.prompt.images)
    # images i and i+1 of a document differ by one level of red
    first = batch.prompt.images[: counts[0]]
    levels = (first[:, 0, 0, 0] * 0.26862954 + 0.48145466) * 255
    assert torch.allclose(levels[1] - levels[0], torch.tensor(1.0), atol=1e-3)


def test_a_pair_longer_than_a_row_is_filtered_and_an_unreadable_image_costs_only_its_document(data):
    long = CaptionSample("fish and dog " * 60, worlds.image(0), key="long")
    report = data(captions=[*worlds.captions(7), long]).train_dataset[range(16)].report
    assert {(error.reason, error.key, error.filtered) for error in report.errors} == {("too_long", "long", True)}
    assert len(report.samples) == 16
    samples = worlds.interleaved(6)
    members = samples[2].encode() | {"0.png": b"not an image"}
    samples[2].encode = lambda: members
    batch = data(interleaved=samples).train_dataset[range(12)]
    assert {(error.reason, error.key) for error in batch.report.errors} == {("unreadable_image", "i00002")}
    assert len(batch) == 12


def test_a_sentence_longer_than_a_row_is_cut_and_rows_without_room_for_an_image_are_refused(tiny_tokenizer):
    packer = Packer(worlds.encoder(tiny_tokenizer), 16)
    units = packer.sentences("x" * 100)
    assert [len(unit.ids) for unit in units[:-1]] == [packer.longest_unit] * (len(units) - 1)
    assert [i for unit in units for i in unit.ids] == packer.tokenizer.encode("x" * 100)
    with pytest.raises(ValueError, match="sequence_length=6"):
        Packer(worlds.encoder(tiny_tokenizer), 6)
