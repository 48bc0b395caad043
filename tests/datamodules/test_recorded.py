"""Every recorded row and batch of the released loaders, and what is not produced; rows of TSV files as converted."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.alignment import AlignmentData, AlignmentDataConfig, ClipTokens
from datamodules.data_config import Source
from datamodules.entities import EntityRules
from datamodules.errors import FilteredSample
from datamodules.images import StoredImage, encode_png
from datamodules.instruction import InstructionData, InstructionDataConfig, InstructionRows
from datamodules.sample import CaptionSample, ConstructedSample, EditSample, Entity
from kosmosg.batches import ReadReport
from kosmosg.image_processing import ClipImageTransform, TargetTransform
from tests.datamodules import worlds
from tests.datamodules.bad_inputs import encoded
from tests.datamodules.sources.published import convert, samples
from tests.datamodules.worlds import RecordedDraws


@pytest.fixture(scope="module")
def batches(golden: Path) -> list[dict]:
    return json.loads((golden / "data" / "collated_batches.json").read_text())


@pytest.fixture(scope="module")
def columns(golden: Path):
    """The columns of a row of one of the recorded TSV files."""

    def read(name: str, row: int) -> list[str]:
        text = (golden / "data" / f"{name}.tsv").read_text(encoding="utf-8")
        return text.split("\n")[row].split("\t")

    return read


def stored(column: str, number: int) -> StoredImage:
    return StoredImage(base64.b64decode(column), str(number), "tsv", "row")


def means(pixels: torch.Tensor) -> torch.Tensor:
    """Of each channel …×H×W, added up one after the other in float32 as the record's were: 0.3 % off at 512 px."""
    flat = pixels.flatten(-2).numpy()
    return torch.from_numpy(np.cumsum(flat, axis=-1, dtype=np.float32)[..., -1]) / flat.shape[-1]


def chosen(images: dict[int, StoredImage], transform, recorded: list[float]) -> int:
    """The column whose image has these channel means: every image of the record has a colour of its own."""
    expected = torch.tensor(recorded)
    found = [n for n, image in images.items() if torch.allclose(means(transform(image.load())), expected, atol=1e-5)]
    assert len(found) == 1
    return found[0]


def instruction(encoder, **options) -> InstructionData:
    config = InstructionDataConfig(entities=EntityRules(drop="per_caption"), min_image_side=0, **options)
    return InstructionData(config, encoder, TargetTransform(512))


def rows_of(module: InstructionData, name: str) -> InstructionRows:
    return InstructionRows(name, None, module.encoder, module.target_transform, module.config)


def converted(golden: Path, name: str, output: Path, *settings: str) -> list:
    convert("tsv", golden / "data" / f"{name}.tsv", output, f"rows={name}", *settings)
    return samples(output)


@pytest.mark.parametrize("name", ["openimage", "instructpix2pix"])
def test_recorded_draws_give_the_recorded_rows(name, golden, loaders, columns, full_encoder, tmp_path):
    """Texts, tokens and mask, and which TSV columns the images are, by their bytes."""
    found = converted(golden, name, tmp_path)
    module = instruction(full_encoder, edit_caption_drop=loaders["random_drop_caption_prob"])
    for record in loaders[name]:
        sample, draws = found[record["row"]], RecordedDraws(record["draws"])
        if not record["yielded"]:
            with pytest.raises(FilteredSample, match="nothing_before_object"):
                rows_of(module, name).segments(sample, draws)
            continue
        segments, target = rows_of(module, name).segments(sample, draws)
        assert not draws.draws
        if name == "openimage":
            texts = [item for item in segments if isinstance(item, str)]
            assert texts == [text for text in record["text_transform_calls"] if text]
        table = {
            base64.b64decode(cell): i for i, cell in enumerate(columns(name, record["row"])) if cell[:5] == "iVBOR"
        }
        used = [table[encode_png(item)] for item in [*segments, target] if not isinstance(item, str)]
        assert used == record["image_columns"]
        prompt, *_ = rows_of(module, name).build(sample, RecordedDraws(record["draws"]))
        # The record has the document; what the model reads is all but its last token, </s>.
        assert prompt.ids.tolist() == record["tokens"][:-1]
        assert prompt.image_mask.int().tolist() == record["input_mask"][:-1]


def test_captions_without_a_whole_size_are_left_out_of_both_stages(golden, loaders, tmp_path):
    found = {int(sample.key.split("-")[1]) for sample in converted(golden, "laion", tmp_path / "a")}
    assert found == {row["row"] for row in loaders["laion"] if row["align"] and has_size(row)}
    assert len(converted(golden, "laion", tmp_path / "b", "images.min_side=384")) == 5  # as stage 3 asks for


def caption_sample(row: dict) -> CaptionSample:
    """A shard's image says its own size; only a TSV row can lack it, and its reader leaves such rows out."""
    size = int(row["width"]), int(row["height"])
    image = StoredImage(encoded(Image.new("1", size), "PNG"), "png", "tsv", str(row["row"]))
    return CaptionSample(row["caption"], image, key=str(row["row"]))


def has_size(row: dict) -> bool:
    return row["width"].isdecimal() and row["height"].isdecimal()


def test_caption_rows_of_stage_3_are_the_recorded_ones(loaders, full_encoder):
    module = InstructionData(InstructionDataConfig(), full_encoder, TargetTransform(8))
    rows = [row for row in loaders["laion"] if not row["align"]]
    assert [row["row"] for row in rows if not has_size(row)] == [3, 4] and len(rows) == 8
    for row in filter(has_size, rows):
        sample = caption_sample(row)
        if not row["yielded"]:
            reason = "caption_too_long" if row["spm_len"] > 128 else "image_too_small"
            with pytest.raises(FilteredSample, match=reason):
                rows_of(module, "captions").build(sample, RecordedDraws([]))
            continue
        segments, target = module_segments(module, sample)
        assert segments == row["text_transform_calls"] and target is sample.image and row["image_columns"] == [2]
        prompt, *_ = rows_of(module, "captions").build(sample, RecordedDraws(row["draws"]))
        assert [*prompt.ids.tolist(), module.encoder.tokenizer.eos_id] == row["tokens"]
        assert [*prompt.image_mask.int().tolist(), 0] == row["input_mask"]


def module_segments(module: InstructionData, sample: CaptionSample):
    return rows_of(module, "captions").segments(sample, RecordedDraws([]))


def test_caption_rows_of_stage_2_are_the_recorded_ones(loaders, full_encoder, full_clip, tmp_path):
    rows = {str(row["row"]): row for row in loaders["laion"] if row["align"] and has_size(row)}
    assert len(rows) == 6
    pattern = worlds.write_members(tmp_path / "a.tar", [(k, {"txt": r["caption"].encode()}) for k, r in rows.items()])
    module = AlignmentData(AlignmentDataConfig(captions=Source(pattern)), full_encoder, ClipTokens(full_clip))
    module.setup()
    batch = module.train_dataset[range(len(rows))]
    assert {e.key for e in batch.report.errors} == {key for key, row in rows.items() if not row["yielded"]}
    assert all(error.reason == "caption_too_long" and error.filtered for error in batch.report.errors)
    read = {name.partition("/")[2]: i for i, name in enumerate(batch.report.samples)}
    assert read.keys() == {key for key, row in rows.items() if row["yielded"]}
    for key, i in read.items():
        ids = batch.prompt.ids[i][~batch.prompt.padding[i]].tolist()
        assert [*ids, full_encoder.tokenizer.eos_id] == rows[key]["tokens"]
        assert not any(rows[key]["input_mask"]) and not batch.prompt.image_mask[i].any()
        assert batch.text_ids[i].tolist() == full_clip([rows[key]["clip_text"]])[0].tolist()


def test_filters_see_the_recorded_lengths(loaders, full_encoder, full_clip):
    for row in loaders["laion"]:
        assert len(full_encoder.tokenizer.encode(row["caption"])) == row["spm_len"]
        assert ClipTokens(full_clip)([row["caption"]])[1] == [row["clip_len"]]


def assert_batch(ours, recorded: dict, pad_id: int) -> None:
    """Ids, mask and image values; a recorded row is padded to its batch's longest as ours is."""
    assert ours.prompt.ids.tolist() == recorded["src_tokens"]
    assert ours.prompt.image_mask.int().tolist() == recorded["img_gpt_input_mask"]
    assert len(ours) == recorded["nsentences"]
    assert int((ours.prompt.ids != pad_id).sum()) + len(ours) == recorded["ntokens"]  # </s> is counted there
    images = {"gpt_img_src_tokens": ours.prompt.images, "img_tgt_tokens": getattr(ours, "targets", None)}
    for name, tensor in images.items():
        if recorded[name] is None:
            assert tensor is None
            continue
        assert list(tensor.shape) == recorded[name]["shape"] and str(tensor.dtype) == f"torch.{recorded[name]['dtype']}"
        expected = torch.tensor(recorded[name]["per_image_channel_mean"])
        torch.testing.assert_close(means(tensor), expected, atol=1e-6, rtol=0)


def test_the_batch_of_constructed_samples_is_the_recorded_one(batches, columns, full_encoder):
    recorded = next(batch for batch in batches if batch["key"] == "vl_openimage")
    module, rows = instruction(full_encoder), []
    pictures = iter(recorded["gpt_img_src_tokens"]["per_image_channel_mean"])
    for row, mask in zip(recorded["rows"], recorded["img_gpt_input_mask"], strict=True):
        caption, tags, *rest = columns("openimage", row)
        images = {2 + i: stored(column, 2 + i) for i, column in enumerate(rest)}
        shown = sum(mask) // full_encoder.image_tokens
        picked = [chosen(images, ClipImageTransform(224), next(pictures)) for _ in range(shown)]
        entities = [Entity(tag, images[3 + 2 * i], images[4 + 2 * i]) for i, tag in enumerate(tags.split(","))]
        # The draws are not recorded, but what they chose is: nothing dropped; odd columns are crops with background.
        draws = RecordedDraws([["random", 0.9], *(["random", 0.9 if n % 2 else 0.1] for n in picked)])
        sample = ConstructedSample(caption, entities, images[2])
        rows.append(rows_of(module, "constructed").build(sample, draws))
        assert not draws.draws
    assert_batch(module.collate(rows, ReadReport()), recorded, full_encoder.tokenizer.pad_id)


def test_the_batch_of_edits_is_the_recorded_one(batches, columns, full_encoder):
    recorded = next(batch for batch in batches if batch["key"] == "vl_instructpix2pix")
    module, rows = instruction(full_encoder), []
    targets = recorded["img_tgt_tokens"]["per_image_channel_mean"]
    for row, target in zip(recorded["rows"], targets, strict=True):
        caption, edit, *rest = columns("instructpix2pix", row)
        images = {2 + i: stored(column, 2 + i) for i, column in enumerate(rest)}
        pair = chosen(images, TargetTransform(512), target)
        sample = EditSample(caption, edit, images[pair - 1], images[pair])
        rows.append(rows_of(module, "edit").build(sample, RecordedDraws([["random", 0.9], ["randint", 0, 0, 0]])))
    assert_batch(module.collate(rows, ReadReport()), recorded, full_encoder.tokenizer.pad_id)


def test_the_batches_of_captions_are_the_recorded_ones(batches, columns, full_encoder, full_clip, tmp_path):
    stage3, stage2 = (batch for batch in batches if batch["key"] == "vl_laion")
    module = instruction(full_encoder)
    rows = []
    for row in stage3["rows"]:
        _, caption, image, *_ = columns("laion", row)
        rows.append(rows_of(module, "captions").build(CaptionSample(caption, stored(image, 2)), RecordedDraws([])))
    assert stage3["clip_tokens"] is None
    assert_batch(module.collate(rows, ReadReport()), stage3, full_encoder.tokenizer.pad_id)
    captions = [columns("laion", row)[1] for row in stage2["rows"]]
    pattern = worlds.write_members(tmp_path / "a.tar", [(str(i), {"txt": c.encode()}) for i, c in enumerate(captions)])
    data = AlignmentData(AlignmentDataConfig(captions=Source(pattern)), full_encoder, ClipTokens(full_clip))
    data.setup()
    keys = [name.partition("/")[2] for name in data.train_dataset[range(len(captions))].report.samples]
    ours = data.train_dataset[[keys.index(str(i)) for i in range(len(captions))]]
    assert_batch(ours, stage2, full_encoder.tokenizer.pad_id)
    assert ours.text_ids.tolist() == stage2["clip_tokens"]
