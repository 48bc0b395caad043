"""Aligners other than the paper's: a linear map, a decoder alone; stored and read by their kind."""

from pathlib import Path

import pytest
import torch

from kosmosg.conversion import ConversionError, export_checkpoint
from kosmosg.models.aligner import AlignerDecoder, AlignerEncoder, LinearAligner, load_aligner
from kosmosg.models.kosmosg import KosmosG
from kosmosg.models.mllm import MLLM
from kosmosg.models.storage import load_part
from kosmosg.tokenizer import Tokenizer
from tests import tiny


@pytest.fixture
def linear() -> LinearAligner:
    return LinearAligner(tiny.WIDTH, tiny.CONDITION_WIDTH, tiny.QUERIES)


@pytest.mark.parametrize("length", [1, 5, tiny.QUERIES, tiny.QUERIES + 3])
def test_linear_condition_is_cut_and_filled_up(linear: LinearAligner, length: int) -> None:
    hidden = torch.randn(2, length, tiny.WIDTH)
    condition = linear(hidden, torch.zeros(2, length, dtype=torch.bool)).states
    kept = min(length, tiny.QUERIES)
    assert condition.shape == (2, tiny.QUERIES, tiny.CONDITION_WIDTH)
    assert torch.equal(condition[:, :kept], linear.projection(hidden[:, :kept]))
    assert torch.equal(condition[:, kept:], linear.padding.expand(2, tiny.QUERIES - kept, -1))


def test_linear_condition_does_not_depend_on_the_batchs_padding(linear: LinearAligner) -> None:
    hidden = torch.randn(1, 6, tiny.WIDTH)
    padding = torch.arange(6)[None] >= 4
    alone = linear(hidden[:, :4], padding[:, :4]).states
    assert torch.equal(linear(hidden, padding).states, alone)


def test_decoder_alone_masks_padding() -> None:
    sizes = {**tiny.aligner_sizes(), "encoder_layers": 0}
    encoder = AlignerEncoder(input_width=tiny.WIDTH, num_queries=tiny.QUERIES, **sizes).eval()
    hidden = torch.randn(1, 6, tiny.WIDTH)
    padding = torch.arange(6)[None] >= 4
    alone = encoder(hidden[:, :4], padding[:, :4]).states
    torch.testing.assert_close(encoder(hidden, padding).states, alone)
    decoder = AlignerDecoder(output_width=tiny.WIDTH, **sizes)
    assert decoder(encoder(hidden, padding), 6).shape == (1, 6, tiny.WIDTH)
    assert not [name for name, _ in [*encoder.named_parameters(), *decoder.named_parameters()] if "encoder." in name]


def test_the_pooled_vector_is_read_from_a_query_of_its_own(tmp_path: Path) -> None:
    encoder = AlignerEncoder(tiny.WIDTH, num_queries=tiny.QUERIES, pooled_width=10, **tiny.aligner_sizes()).eval()
    hidden, padding = torch.randn(2, 5, tiny.WIDTH), torch.zeros(2, 5, dtype=torch.bool)
    condition = encoder(hidden, padding)
    assert condition.states.shape == (2, tiny.QUERIES, tiny.CONDITION_WIDTH) and condition.pooled.shape == (2, 10)
    condition.pooled.sum().backward()
    assert encoder.queries.grad[-1].any() and not torch.equal(*condition.pooled)
    encoder.save_pretrained(tmp_path)
    read = load_aligner(tmp_path)(hidden, padding)
    assert torch.equal(read.states, condition.states) and torch.equal(read.pooled, condition.pooled)


def test_folders_are_read_by_their_kind(linear: LinearAligner, tiny_model: Path, tmp_path: Path) -> None:
    mllm, tokenizer = load_part(MLLM, tiny_model / "mllm"), Tokenizer.from_pretrained(tiny_model / "tokenizer")
    model = KosmosG(mllm, linear)
    model.save_pretrained(tmp_path, tokenizer=tokenizer)
    read = KosmosG.from_pretrained(tmp_path)
    assert isinstance(read.aligner, LinearAligner)
    assert torch.equal(read.null_condition().states, model.eval().null_condition().states)
    with pytest.raises(ValueError, match="holds a LinearAligner, not a AlignerEncoder"):
        load_part(AlignerEncoder, tmp_path / "aligner")
    with pytest.raises(ConversionError, match="which released checkpoints have no place for"):
        export_checkpoint(tmp_path, tmp_path / "released.pt")
    assert isinstance(load_aligner(tiny_model / "aligner"), AlignerEncoder)
    with pytest.raises(FileNotFoundError, match="stage 3 an aligner"):
        load_aligner(tmp_path / "nowhere")
