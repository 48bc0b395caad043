"""Batches of stages 2 and 3: prompts, targets, filters, and when bad samples stop a run."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from datamodules.alignment import AlignmentData, AlignmentDataConfig, ClipTokens, WholeCaptions
from datamodules.data_config import Source
from datamodules.entities import EntityRules
from datamodules.errors import DataError, SampleError
from datamodules.images import Limits
from datamodules.instruction import InstructionData, InstructionDataConfig
from datamodules.report import SampleCounter
from kosmosg.batches import ReadReport
from kosmosg.image_processing import TargetTransform
from kosmosg.prompt import PromptEncoder
from tests.datamodules import worlds


def alignment(pattern: str, tokenizer, **options) -> AlignmentData:
    config = AlignmentDataConfig(captions=Source(pattern), **options)
    module = AlignmentData(config, worlds.encoder(tokenizer), worlds.clip())
    module.setup()
    return module


def instruction(tmp_path, tokenizer, **options) -> InstructionData:
    sources = {
        "constructed": Source(worlds.write(tmp_path, "constructed", worlds.constructed(9)), 2),
        "edit": Source(worlds.write(tmp_path, "edit", worlds.edits(9)), 2),
        "captions": Source(worlds.write(tmp_path, "captions", worlds.captions(9)), 1),
    }
    config = InstructionDataConfig(**({"min_image_side": 0} | sources | options))
    module = InstructionData(config, worlds.encoder(tokenizer), TargetTransform(worlds.SIDE))
    module.setup()
    return module


def test_stage_2_batches_are_what_the_prompt_encoder_makes(tmp_path, tiny_tokenizer):
    samples = worlds.captions(8)
    samples[3].caption += ", and many more words than the others have"
    module = alignment(worlds.write(tmp_path, "captions", samples), tiny_tokenizer, max_pieces=500)
    batch = module.train_dataset[range(8)]
    captions = {sample.key: sample.caption for sample in samples}
    texts = [captions[name.partition("/")[2]] for name in batch.report.samples]
    expected = module.encoder.collate([module.encoder([text]) for text in texts])
    for name in ("ids", "image_mask", "padding"):
        assert torch.equal(getattr(batch.prompt, name), getattr(expected, name))
    assert batch.prompt.images is None
    assert torch.equal(batch.text_ids, worlds.clip_tokenize(texts))


def test_stage_2_reads_prompts_with_images_and_what_they_mean(tmp_path, tiny_tokenizer):
    samples = worlds.constructed(6)
    samples[2].description = "a red fish and a dog with spots"
    pattern = worlds.write(tmp_path, "constructed", samples)
    captions = Source(worlds.write(tmp_path, "captions", worlds.captions(6)))
    config = AlignmentDataConfig(
        captions=captions, constructed=Source(pattern, 2), entities=EntityRules(drop_probability=1.0), max_pieces=500
    )
    module = AlignmentData(config, worlds.encoder(tiny_tokenizer), worlds.clip())
    module.setup()
    batch = module.train_dataset[range(9)]
    assert Counter(batch.report.sources) == {"captions": 3, "constructed": 6}
    meant = {sample.key: getattr(sample, "description", "") or sample.caption for sample in samples}
    meant |= {f"captions/{sample.key}": sample.caption for sample in worlds.captions(6)}
    for row, (source, name) in enumerate(zip(batch.report.sources, batch.report.samples, strict=True)):
        key = name.partition("/")[2]
        text = meant[key if source == "constructed" else f"captions/{key}"]
        assert torch.equal(batch.text_ids[row], worlds.clip_tokenize([text])[0])
        assert batch.prompt.images_per_row[row] == (2 if source == "constructed" else 0)


def test_stage_3_tells_the_captions_of_targets_where_a_loss_reads_them(tmp_path, tiny_tokenizer):
    module = instruction(tmp_path, tiny_tokenizer)
    assert module.train_dataset[range(5)].text_ids is None
    module.clip = worlds.clip()
    batch = module.train_dataset[range(10)]
    known = {sample.key: sample.caption for sample in worlds.constructed(9)}
    for row, (source, name) in enumerate(zip(batch.report.sources, batch.report.samples, strict=True)):
        key = name.partition("/")[2]
        if source == "edit":
            assert (batch.text_ids[row] == -1).all()
        elif source == "constructed":
            assert torch.equal(batch.text_ids[row], worlds.clip_tokenize([known[key]])[0])


def test_clip_tokens_are_counted_beyond_what_the_tokenizer_keeps():
    for text, length in [("", 0), ("dog", 3), ("x" * 75, 75), ("x" * 74 + " x", 75), ("ab " * 60, 120)]:
        assert ClipTokens(worlds.clip_tokenize)([text])[1] == [length]


ODD = ["It's  a\tdog!!\n", "e\u0301 \u0301 \u00a0x\u2003y", "кошка😀 на 123столе", "\x1c a\x85b", "a " * 99, ""]


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=4))
@example(texts=ODD)
def test_clip_ids_word_by_word_are_those_of_the_whole_caption(full_clip, texts):
    assert torch.equal(ClipTokens(full_clip)(texts)[0], full_clip(texts))


def test_the_recorded_clip_ids_are_reproduced(full_clip, golden: Path):
    records = json.loads((golden / "data" / "tokenization.json").read_text())["clip"]
    # The released code straightened curly quotes (ftfy) before CLIP's tokenizer; transformers' tokenizer does not.
    records = [record for record in records if "“" not in record["text"]]
    assert len(records) > 5
    ids, lengths = ClipTokens(full_clip)([record["text"] for record in records])
    assert ids.tolist() == [record["ids"] for record in records]
    assert lengths == [record["n_tokens"] for record in records]


def test_stage_2_filters_captions_at_the_recorded_limits_and_never_looks_at_images(tmp_path, tiny_tokenizer):
    texts = {"at75": b"fish " * 18 + b"dog", "at76": b"fish " * 19, "short": b"a dog"}  # a CLIP token each letter
    texts |= {"latin": b"caf\xe9", "blank": b" ", "large": b"a dog " * 20_000}
    groups = [(key, {"jpg": b"not an image", "txt": text}) for key, text in texts.items()]
    wrong = {"latin": "not_utf8", "blank": "empty_caption", "large": "member_too_large"}
    pattern, limits = worlds.write_members(tmp_path / "a.tar", groups), Limits(max_member_bytes=100_000)
    pieces = len(worlds.encoder(tiny_tokenizer).tokenizer.encode("a dog"))
    for most, long in ((500, ["at76"]), (pieces, ["at75", "at76"])):
        module = alignment(pattern, tiny_tokenizer, max_pieces=most, limits=limits)
        errors = module.train_dataset[range(6)].report.errors
        assert {error.key: error.reason for error in errors} == wrong | dict.fromkeys(long, "caption_too_long")
        assert {error.key for error in errors if error.filtered} == set(long)


def test_captions_tokenised_whole_are_counted_without_what_stands_before(tiny_tokenizer):
    """Start and an instruction of four tokens, then two tokens for each letter."""

    def tokenize(texts):
        rows = [[1, 9, 9, 9, 9, *(i for letter in text for i in (ord(letter), 3))][:15] for text in texts]
        return torch.tensor([row + [0] * (15 - len(row)) for row in rows])

    captions = WholeCaptions(tokenize)
    ids, lengths = captions(["ab", "b", ""])
    assert lengths == [4, 2, 0] and torch.equal(ids, tokenize(["ab", "b", ""])) and captions.room == 9
    with pytest.raises(ValueError, match="the image decoder's text model takes captions of at most 9 tokens"):
        AlignmentData(AlignmentDataConfig(max_clip_tokens=10), worlds.encoder(tiny_tokenizer), captions)


def test_limits_beyond_the_models_are_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="max_clip_tokens=76"):
        AlignmentData(AlignmentDataConfig(max_clip_tokens=76), worlds.encoder(tiny_tokenizer), worlds.clip())
    short = worlds.encoder(tiny_tokenizer)
    short = PromptEncoder(short.tokenizer, short.image_transform, short.image_tokens, max_length=85)
    with pytest.raises(ValueError, match="max_pieces=85"):
        AlignmentData(AlignmentDataConfig(), short, worlds.clip())


def test_stage_3_mixes_two_two_one_with_prompts_that_are_not_closed_and_their_targets(tmp_path, tiny_tokenizer):
    module = instruction(tmp_path, tiny_tokenizer)
    batch = module.train_dataset[range(20)]
    assert Counter(batch.report.sources) == {"constructed": 8, "edit": 8, "captions": 4}
    assert batch.targets.shape == (20, 3, worlds.SIDE, worlds.SIDE)
    images = {"constructed": 2, "edit": 1, "captions": 0}
    slots = batch.prompt.image_mask.sum(1) // worlds.SLOTS
    assert slots.tolist() == [images[name] for name in batch.report.sources]
    assert len(batch.prompt.images) == slots.sum()
    assert not (batch.prompt.ids == module.encoder.tokenizer.eos_id).any()
    for target, source, name in zip(batch.targets, batch.report.sources, batch.report.samples, strict=True):
        number = int(name[-5:]) + (source == "edit")
        assert torch.allclose(target[0], torch.tensor(number / 127.5 - 1))


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_edit_captions_are_emptied_as_often_as_asked(tmp_path, tiny_tokenizer, probability):
    module = instruction(
        tmp_path, tiny_tokenizer, edit_caption_drop=probability, constructed=Source(), captions=Source()
    )
    batch = module.train_dataset[range(100)]
    emptied = (batch.prompt.ids[:, 1] == module.encoder.tokenizer.image_id).float().mean()
    assert abs(emptied - probability) < (0.15 if probability == 0.5 else 1e-9)


def test_choices_inside_a_sample_change_from_epoch_to_epoch(tmp_path, tiny_tokenizer):
    module = instruction(tmp_path, tiny_tokenizer, edit=Source(), captions=Source())
    lengths = {}
    for position in range(9 * 12):
        batch = module.train_dataset[[position]]
        lengths.setdefault(batch.report.samples[0], set()).add(batch.prompt.ids.shape[1])
    assert len(lengths) == 9 and all(len(seen) > 1 for seen in lengths.values())


def test_released_rows_without_anything_before_the_object_are_filtered(tmp_path, tiny_tokenizer):
    samples = worlds.constructed(4)
    for sample in samples:
        sample.caption = sample.caption.removeprefix("a ")
    pattern = worlds.write(tmp_path / "first", "constructed", samples)
    options = {"constructed": Source(pattern), "edit": Source(), "captions": Source()}
    rules = EntityRules(drop="per_caption", drop_probability=0.5)
    report = instruction(tmp_path, tiny_tokenizer, entities=rules, **options).train_dataset[range(40)].report
    assert {error.reason for error in report.errors} == {"nothing_before_object"} and len(report.samples) == 40
    counter = SampleCounter(0.0, 1)
    counter.add(report)  # filtered samples never stop a run


@pytest.mark.parametrize(
    ("source", "options", "reason"),
    [
        ("captions", {"min_image_side": 17}, "image_too_small"),
        ("captions", {"max_pieces": 2}, "caption_too_long"),
        ("constructed", {}, "prompt_too_long"),
    ],
)
def test_filters_of_stage_3(tmp_path, tiny_tokenizer, source, options, reason):
    others = {name: Source() for name in ("constructed", "edit", "captions") if name != source}
    module = instruction(tmp_path, tiny_tokenizer, **others, **options)
    if reason == "prompt_too_long":
        module.encoder.max_length = 10
    with pytest.raises(DataError, match=reason):
        module.train_dataset[[0]]


def test_rotten_data_stop_the_run(tmp_path, tiny_tokenizer, caplog):
    groups = [(f"k{i:04d}", {"txt": b"a dog" if i % 2 else b""}) for i in range(100)]
    module = alignment(worlds.write_members(tmp_path / "a.tar", groups), tiny_tokenizer, max_bad_share=0.2)
    with pytest.raises(DataError, match=r"empty_caption.*max_bad_share is 0\.2"):
        for start in range(0, 100, 10):
            module.counter.add(module.train_dataset[range(start, start + 10)].report)
    assert module.counter.failed >= 20
    named = [record for record in caplog.records if "a.tar, sample" in record.message]
    assert 0 < len(named) <= 20


def test_a_few_bad_samples_never_stop_a_run():
    counter = SampleCounter(max_bad_share=0.0, min_bad_count=3)
    for i in range(2):
        counter.add(ReadReport(reads=1, errors=[SampleError("not_utf8", "a.tar", str(i))]))
    with pytest.raises(DataError, match="3 of 3"):
        counter.add(ReadReport(reads=1, errors=[SampleError("not_utf8", "a.tar", "1")]))
    assert counter.dropped == {"not_utf8": 2}  # the third was met before
