"""Mixing by rows, by whole batches and by tokens; the same global sequence for any number of ranks."""

import itertools
from collections import Counter
from pathlib import Path

import lightning
import pytest

from datamodules.data_config import Source
from datamodules.errors import DataError
from datamodules.instruction import InstructionData, InstructionDataConfig
from datamodules.language_modelling import LanguageModellingData, LanguageModellingDataConfig
from datamodules.mixture import DRAWS_PER_WEIGHT, BatchPositions
from datamodules.order import Mixture
from datamodules.sample import CaptionSample, EditSample, TextSample
from kosmosg.image_processing import TargetTransform
from tests.datamodules import worlds
from tests.datamodules.recorders import fit

RELEASED = (2, 2, 1)  # constructed, edit, captions


def turns(order: Mixture, first: int, n: int) -> list[int]:
    return [order(turn * order.rows_per_draw).source for turn in range(first, first + n)]


@pytest.mark.parametrize("lanes", [1, 8])
def test_turns_spread_as_independent_draws_of_the_released_weights_do(lanes):
    """Counts of a source in a step of 64 ranks: mean 64·p, variance 64·p·(1-p)."""
    order = Mixture(0, RELEASED, lanes, 16, 16, DRAWS_PER_WEIGHT)
    steps = [Counter(turns(order, 64 * step, 64)) for step in range(200)]
    for source, p in enumerate((0.4, 0.4, 0.2)):
        counts = [step[source] for step in steps]
        mean = sum(counts) / len(counts)
        variance = sum((count - mean) ** 2 for count in counts) / len(counts)
        assert abs(mean - 64 * p) < 0.9
        assert abs(variance / (64 * p * (1 - p)) - 1) < 0.35
    pairs = Counter(itertools.pairwise(turns(order, 0, 5000)))
    assert abs(pairs[0, 0] / 4999 - 0.16) < 0.02 and abs(pairs[2, 2] / 4999 - 0.04) < 0.01


SETS = {"constructed": worlds.constructed(21), "edit": worlds.edits(13), "captions": worlds.captions(9)}


def module(folder: Path, tokenizer: Path, **options) -> InstructionData:
    sources = {}
    for weight, (name, samples) in zip(RELEASED, SETS.items(), strict=True):
        if not list(folder.glob(f"{name}-*.tar")):
            worlds.write(folder, name, samples)
        sources[name] = Source(str(folder / f"{name}-*.tar"), weight)
    config = InstructionDataConfig(**({"min_image_side": 0, "micro_batch_size": 3} | sources | options))
    return InstructionData(config, worlds.encoder(tokenizer), TargetTransform(worlds.SIDE))


def test_a_micro_batch_has_one_source_whatever_the_number_of_ranks(tmp_path, tiny_tokenizer):
    data = module(tmp_path, tiny_tokenizer, mixing="per_batch")
    data.setup()
    batches = {}
    for world in (1, 2, 4):
        ranks = [BatchPositions(3, 8 // world, rank, world, lambda: 0) for rank in range(world)]
        steps = zip(*ranks, strict=True)
        batches[world] = [data.train_dataset[positions].report for step in steps for positions in step]
    assert all(len(set(report.sources)) == 1 for report in batches[1])
    names = [[report.samples for report in batches[world]] for world in (1, 2, 4)]
    assert names[0] == names[1] == names[2]


def test_whole_batches_of_another_size_are_another_order(tmp_path, tiny_tokenizer):
    fit(tmp_path / "run", module(tmp_path / "data", tiny_tokenizer, mixing="per_batch"), 4)
    path = str(tmp_path / "run" / "step=4.ckpt")
    for change, message in (
        ({"micro_batch_size": 4, "mixing": "per_batch"}, "3 → 4"),
        ({}, "mixing per_batch → per_sample"),
    ):
        with pytest.raises(DataError, match=message):
            fit(tmp_path / "run", module(tmp_path / "data", tiny_tokenizer, **change), 6, checkpoint=path)
    resumed = module(
        tmp_path / "data", tiny_tokenizer, mixing="per_batch", micro_batch_size=4, accept_changed_data=True
    )
    recorder = fit(tmp_path / "run", resumed, 6, checkpoint=path)
    sources = [{name.split("-")[0] for name in names} for names in recorder.seen.values()]
    assert all(len(found) == 1 for found in sources)  # it goes on at a whole turn


def share_of_tokens(data, name: str, rows: int = 300) -> float:
    """Of a source, padding left out."""
    data.setup()
    data.measure()
    tokens = Counter()
    for start in range(0, rows, 30):
        batch = data.train_dataset[range(start, start + 30)]
        for source, length in zip(batch.report.sources, (~batch.prompt.padding).sum(1).tolist(), strict=True):
            tokens[source] += length
    return tokens[name] / tokens.total()


def test_tokens_are_shared_out_where_rows_are_documents(tmp_path, tiny_tokenizer):
    """Long edits beside short captions: 1 : 1 by rows is far from 1 : 1 by tokens."""
    long = [EditSample(f"a fish {i} " * 9, "at night", worlds.image(i), worlds.image(i), key=f"{i}") for i in range(60)]
    short = [CaptionSample(f"dog {i}", worlds.image(i), key=f"{i}") for i in range(60)]
    options = {
        "edit": Source(worlds.write(tmp_path, "edit", long), 1),
        "captions": Source(worlds.write(tmp_path, "captions", short), 1),
        "constructed": Source(),
    }
    assert share_of_tokens(module(tmp_path / "x", tiny_tokenizer, **options), "edit") > 0.75
    data = module(tmp_path / "x", tiny_tokenizer, weights_of="tokens", **options)
    assert abs(share_of_tokens(data, "edit") - 0.5) < 0.08
    assert data.train_dataset.order.weights[0] < data.train_dataset.order.weights[1]
    assert data.identity()["sources"]["edit"]["weight"] == 1  # as configured


def test_tokens_of_packed_rows_are_shared_out_without_padding(tmp_path, tiny_tokenizer):
    """Pairs are never divided, so their rows hold more padding than rows of text."""
    pairs = [CaptionSample("a fish and a dog in the garden " * 2, worlds.image(i), key=f"{i}") for i in range(40)]
    texts = [TextSample("The dog sleeps. " * 200) for _ in range(40)]
    config = LanguageModellingDataConfig(
        text=Source(worlds.write(tmp_path, "text", texts), 5),
        captions=Source(worlds.write(tmp_path, "captions", pairs), 5),
        sequence_length=64,
        weights_of="tokens",
    )
    data = LanguageModellingData(config, worlds.encoder(tiny_tokenizer))
    assert abs(share_of_tokens(data, "text", rows=240) - 0.5) < 0.02
    weights = data.train_dataset.order.weights
    assert weights[1] > 1.05 * weights[0]


def test_validation_is_mixed_by_rows(tmp_path, tiny_tokenizer):
    data = module(tmp_path, tiny_tokenizer, mixing="per_batch")
    for source in (data.config.constructed, data.config.edit, data.config.captions):
        source.validation = source.shards
    data.trainer = lightning.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    data.setup()
    batches = [batch.report.sources for batch in data.val_dataloader()]
    assert any(len(set(sources)) > 1 for sources in batches)
