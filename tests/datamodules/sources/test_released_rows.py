"""The released code's TSV rows, converted and built into prompts, give the recorded tokens and images."""

import json
from pathlib import Path

import pytest

from datamodules.data_config import Source
from datamodules.entities import EntityRules
from datamodules.errors import FilteredSample
from datamodules.images import encode_png
from datamodules.instruction import InstructionDataConfig, InstructionRows
from datamodules.sample import Sample
from kosmosg.image_processing import ClipImageTransform, TargetTransform
from kosmosg.prompt import PromptEncoder
from kosmosg.tokenizer import Tokenizer
from tests.datamodules.sources.test_conversion import convert, samples
from tests.datamodules.test_entities import RecordedDraws


@pytest.fixture(scope="module")
def loaders(golden: Path) -> dict:
    return json.loads((golden / "data" / "loaders.json").read_text())


@pytest.fixture(scope="module")
def rows(golden: Path, loaders: dict) -> InstructionRows:
    folder = golden.parent / "tokenizer"
    if not folder.is_dir():
        pytest.skip(f"the full-size tokenizer is not at '{folder}'")
    tokenizer = Tokenizer(folder / "sentencepiece.bpe.model", folder / "dict.txt")
    encoder = PromptEncoder(tokenizer, ClipImageTransform(8), loaders["image_token_length"])
    config = InstructionDataConfig(
        constructed=Source(),
        entities=EntityRules(drop="per_caption"),
        edit_caption_drop=loaders["random_drop_caption_prob"],
        min_image_side=0,  # the recorded sizes are columns; the recorded images are 8 pixels wide
    )
    return InstructionRows("tsv", None, encoder, TargetTransform(8), config)  # type: ignore[arg-type]


def columns(golden: Path, name: str) -> list[list[bytes]]:
    return [line.split(b"\t") for line in (golden / "data" / f"{name}.tsv").read_bytes().split(b"\n") if line]


def converted(golden: Path, name: str, output: Path, *settings: str) -> list[Sample]:
    convert("tsv", golden / "data" / f"{name}.tsv", output, f"rows={name}", *settings)
    return samples(output)


def used(segments: list, target, row: list[bytes]) -> list[int]:
    """TSV columns of the images used, by their bytes."""
    import base64

    stored = {base64.b64decode(value): i for i, value in enumerate(row) if value.startswith(b"iVBOR")}
    return [stored[encode_png(item)] for item in [*segments, target] if not isinstance(item, str)]


@pytest.mark.parametrize("name", ["openimage", "instructpix2pix"])
def test_recorded_draws_give_the_recorded_rows(name: str, golden: Path, loaders, rows, tmp_path: Path) -> None:
    found, table = converted(golden, name, tmp_path), columns(golden, name)
    assert len(found) == len(table)
    for record in loaders[name]:
        sample, draws = found[record["row"]], RecordedDraws(record["draws"])
        if not record["yielded"]:
            with pytest.raises(FilteredSample, match="nothing_before_object"):
                rows.segments(sample, draws)
            continue
        segments, target = rows.segments(sample, draws)
        assert not draws.draws
        assert used(segments, target, table[record["row"]]) == record["image_columns"]
        prompt, *_ = rows.build(sample, RecordedDraws(record["draws"]))
        # The record has the document; what the model reads is all but its last token, </s>.
        assert prompt.ids.tolist() == record["tokens"][:-1]
        assert prompt.image_mask.int().tolist() == record["input_mask"][:-1]


def test_recorded_captions_of_stage_3(golden: Path, loaders, rows, tmp_path: Path) -> None:
    found = {sample.key: sample for sample in converted(golden, "laion", tmp_path, "images.min_side=384")}
    for record in (record for record in loaders["laion"] if not record["align"]):
        sample = found.get(f"00000-{record['row']:09d}-000")
        if not record["yielded"]:
            if sample is not None:
                with pytest.raises(FilteredSample, match="caption_too_long"):
                    rows.build(sample, RecordedDraws([]))
            continue
        assert rows.build(sample, RecordedDraws([]))[0].ids.tolist() == record["tokens"][:-1]
    assert len(found) == 5


def test_captions_without_a_whole_size_are_left_out_of_both_stages(golden: Path, loaders, tmp_path: Path) -> None:
    found = {int(sample.key.split("-")[1]) for sample in converted(golden, "laion", tmp_path)}
    kept = {record["row"] for record in loaders["laion"] if record["align"] and record["width"].isdigit()}
    assert found == kept


def test_an_empty_first_column_is_an_empty_caption(tmp_path: Path) -> None:
    from tests.datamodules.sources import published

    row = f"\tmake it night\t{published.encoded(0)}\t{published.encoded(1)}\n"
    published.write(tmp_path / "a.tsv", row)
    convert("tsv", tmp_path / "a.tsv", tmp_path / "out", "rows=instructpix2pix")
    sample = samples(tmp_path / "out")[0]
    assert (sample.caption, sample.instruction, len(sample.pairs)) == ("", "make it night", 1)
