"""Tokenisation, inference prompts and image preprocessing of the recorded set (full vocabulary)."""

import gzip
import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from datamodules.alignment import ClipTokens
from kosmosg.image_processing import ClipImageTransform, TargetTransform
from kosmosg.models.stable_diffusion import StableDiffusion
from kosmosg.prompt import PromptEncoder, parse_prompt
from kosmosg.tokenizer import Tokenizer
from tests.parity.conftest import Recording

CLEANED = {
    "a ﬁeld of ﬂowers": "a field of flowers",
    "Ａ１ “quoted” it’s": 'a1 "quoted" it\'s',
    "salt &amp;amp; pepper &lt;b&gt;": "salt & pepper <b>",
    "caf\u00c3\u00a9 \u00a0 \u2003 \n au lait": "café au lait",
    "A plain  CAPTION ": "a plain caption",
}
HALF_PRECISION = 2e-3  # the recorded images are float16, with values up to 2.6


@pytest.fixture(scope="module")
def tokenizer(golden) -> Tokenizer:
    folder = golden.parent / "tokenizer"
    if not folder.is_dir():
        pytest.skip(f"no tokenizer beside the recorded set, at '{folder}'")
    return Tokenizer.from_pretrained(folder)


def read(golden, name):
    return json.loads((golden / "data" / name).read_text())


def test_vocabulary(golden, tokenizer):
    released = json.loads((golden.parent / "keys_full.json").read_text())["vocabulary"]
    assert len(tokenizer) == released["size"]
    assert {symbol: tokenizer.index[symbol] for symbol in released["ids"]} == released["ids"]


def test_tokenization(golden, tokenizer):
    recorded = read(golden, "tokenization.json")["tokens"]
    assert recorded
    for case in recorded:
        ids = tokenizer.encode(case["text"])
        if ids != case["ids"]:
            # Equally likely splits of a long run of one letter: which wins changed between SentencePiece versions.
            assert tokenizer.decode(ids) == tokenizer.decode(case["ids"]), case["text"]
            assert sorted(ids) == sorted(case["ids"]), case["text"]
            assert len(set(case["text"])) == 1, case["text"]


def public_clip_tokenizer(merges_file):
    """CLIP's tokenizer from its public merges: bytes, bytes at a word's end, merges, two special tokens."""
    count = 49152 - 256 - 2
    lines = gzip.decompress(merges_file.read_bytes()).decode("utf-8").split("\n")[1 : count + 1]
    merges = [tuple(line.split()) for line in lines]
    # CLIP orders its bytes by readability: printable ones first, the others moved above 255.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    names = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    names += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=merges)


def test_clip_ids(golden, recorded):
    decoder = Recording(recorded).decoder()
    merges = golden.parent / "tokenizer" / "clip_bpe_simple_vocab_16e6.txt.gz"
    if not merges.is_file():
        pytest.skip(f"no CLIP merges at '{merges}'")
    reader = StableDiffusion(text_encoder=decoder.text_encoder, tokenizer=public_clip_tokenizer(merges))
    recorded = read(golden, "tokenization.json")["clip"]
    by_words = ClipTokens(partial(reader.tokenize, clean=False), reader.clean)
    for case in recorded:
        assert reader.tokenize([case["text"]])[0].tolist() == case["ids"], case["text"]
        assert by_words([case["text"]])[0][0].tolist() == case["ids"], case["text"]
    # The public tokenizer's ids of what its cleaning changes.
    for text, clean in CLEANED.items():
        assert reader.tokenize([text]).equal(reader.tokenize([clean], clean=False)), text
        assert by_words([text])[0].equal(reader.tokenize([text])), text


def test_prompts(golden, tokenizer):
    recorded = read(golden, "prompts.json")
    encoder = PromptEncoder(tokenizer, ClipImageTransform(), recorded["image_token_length"])
    picture = Image.new("RGB", (300, 260), "teal")
    assert recorded["prompts"]
    for case in recorded["prompts"]:
        encoded = encoder(parse_prompt(case["prompt"], [picture] * case["n_images"]))
        assert encoded.ids.tolist() == case["src_tokens"], case["prompt"]
        assert encoded.image_mask.int().tolist() == case["img_gpt_input_mask"], case["prompt"]
        assert encoder([case["negative_prompt"]]).ids.tolist() == case["negative_tokens"], case["prompt"]
        if case["n_images"]:
            assert list(torch.stack(encoded.images).shape) == case["images_shape"], case["prompt"]


def test_image_preprocessing(recording):
    folder = recording.folder
    pixels = load_file(folder / "data" / "image_preprocess.safetensors")
    seen = set()
    for number, case in enumerate(read(folder, "image_preprocess.json")):
        image = Image.open(folder / "data" / case["file"])
        understanding, target = ClipImageTransform()(image), TargetTransform()(image)
        for ours, recorded in ((understanding, case["gpt"]), (target, case["diff"])):
            assert list(ours.shape) == recorded["shape"]
            first = ours.flatten()[: len(recorded["first64"])].double().numpy()
            np.testing.assert_allclose(first, recorded["first64"], rtol=0, atol=1e-6)
            np.testing.assert_allclose(ours.double().mean(dim=(1, 2)), recorded["mean"], rtol=0, atol=1e-6)
            np.testing.assert_allclose(ours.double().std(dim=(1, 2)), recorded["std"], rtol=1e-4)
        views = {
            "gpt224_fp16": understanding,
            "gpt224_every4": understanding[:, ::4, ::4],
            "diff512_every8": target[:, ::8, ::8],
            "diff512_crop": target[:, 240:272, 240:272],
        }
        for name, ours in views.items():
            key = f"{number}.{name}"
            if key in pixels:
                seen.add(key)
                torch.testing.assert_close(ours.double(), pixels[key].double(), rtol=0, atol=HALF_PRECISION)
    assert seen == set(pixels)
