"""Every kind of source, as converted, is trained on for two steps of the stage that reads it."""

from pathlib import Path

import pytest
import yaml

import train
from tests.datamodules import worlds
from tests.datamodules.sources import published
from tests.datamodules.sources.published import convert
from tests.lightning_modules import miniature

TEXT = published.jsonl([{"text": f"A fish, {i}. It swims. The dog sleeps!"} for i in range(12)])


def text(folder: Path) -> str:
    published.write(folder / "in/c4.json", TEXT)
    convert("text", folder / "in", folder / "out")
    return str(folder / "out/train-*.tar")


def img2dataset(folder: Path) -> str:
    return worlds.index(published.img2dataset(folder))  # by img2dataset's own counts


def captions(folder: Path) -> str:
    rows = [{"TEXT": caption, "URL": "http://example.org"} for caption in published.CAPTIONS * 3]
    published.write(folder / "in/laion.jsonl", published.jsonl(rows))
    convert("captions", folder / "in", folder / "out", "column=TEXT")
    return str(folder / "out/train-*.tar")


def converted(layout: str, write, *settings: str):
    def make(folder: Path) -> str:
        source = write(folder / "in")
        convert(layout, source, folder / "out", *(item.format(source=source) for item in settings))
        return str(folder / "out/train-*.tar")

    return make


INSTRUCTIONS = ("prompt=instruction", "inputs=[input_images]", "target=output_image", "store={source}")
RUNS = {
    "language_modelling": {
        "text": text,
        "captions": img2dataset,
        "interleaved": converted("obelics", published.obelics),
    },
    "alignment": {"captions": captions},
    "instruction_tuning": {
        "constructed": converted("tsv", lambda folder: published.tsv(folder / "a.tsv", "openimage"), "rows=openimage"),
        "edit": converted("instructpix2pix", published.instructpix2pix),
        "captions": converted("openimages", published.open_images, "narratives={source}/narratives"),
        "instructions": converted("instructions", published.instructions, *INSTRUCTIONS),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", RUNS)
def test_every_source_is_trained_on(stage: str, tmp_path: Path, configs: dict[str, Path]) -> None:
    # One row of each source a step, so that two steps read all of them.
    shards = {source: make(tmp_path / source) for source, make in RUNS[stage].items()}
    sources = {source: {"shards": pattern, "weight": 1, "validation": ""} for source, pattern in shards.items()}
    sources["captions"]["validation"] = shards["captions"]
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"data": {**sources, "micro_batch_size": len(sources)}}))
    assert train.main([str(configs[stage]), str(tmp_path / "more.yaml"), "trainer.max_steps=2"]) == 0
    assert [row[0] for row in miniature.losses(tmp_path / stage)] == ["1", "2"]
    assert all(float(loss) > 0 for _, loss in miniature.losses(tmp_path / stage))
