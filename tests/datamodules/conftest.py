"""The full-size tokenizers of the reference data, and the released loaders' records."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kosmosg.image_processing import ClipImageTransform
from kosmosg.prompt import PromptEncoder
from kosmosg.tokenizer import Tokenizer


def full_clip_tokenizer(merges: Path) -> CLIPTokenizer:
    lines = gzip.decompress(merges.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    pairs = [tuple(line.split()) for line in lines]
    names = list(bytes_to_unicode().values())
    names += [name + "</w>" for name in names] + ["".join(pair) for pair in pairs]
    names += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=pairs, model_max_length=77)


@pytest.fixture(scope="module")
def full_clip(golden: Path) -> Callable[[list[str]], torch.Tensor]:
    merges = golden.parent / "tokenizer" / "clip_bpe_simple_vocab_16e6.txt.gz"
    if not merges.is_file():
        pytest.skip(f"CLIP's merges are not at '{merges}'")
    tokenizer = full_clip_tokenizer(merges)

    def tokenize(texts: list[str]) -> torch.Tensor:
        return torch.tensor(tokenizer(texts, padding="max_length", truncation=True, max_length=77).input_ids)

    return tokenize


@pytest.fixture(scope="module")
def loaders(golden: Path) -> dict:
    return json.loads((golden / "data" / "loaders.json").read_text())


@pytest.fixture(scope="module")
def full_encoder(golden: Path, loaders: dict) -> PromptEncoder:
    folder = golden.parent / "tokenizer"
    if not folder.is_dir():
        pytest.skip(f"the full-size tokenizer is not at '{folder}'")
    tokenizer = Tokenizer(folder / "sentencepiece.bpe.model", folder / "dict.txt")
    return PromptEncoder(tokenizer, ClipImageTransform(224), loaders["image_token_length"])
