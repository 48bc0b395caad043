"""Toyland's two vocabularies: SentencePiece for the MLLM, byte-pair merges for CLIP, both trained on its own text."""

import json
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from kosmosg.tokenizer import Tokenizer as PromptTokenizer
from kosmosg.toyland.language import caption, document, sample_edit, story
from kosmosg.toyland.scene import sample_scene

START, END = "<|startoftext|>", "<|endoftext|>"


def sentences(count: int, seed: int) -> list[str]:
    """Lines of every kind that Toyland's data sets hold."""
    rng = np.random.default_rng([seed, 0x7E17])
    lines = []
    for number in range(count):
        sort = number % 4
        if sort == 0:
            lines.append(story(rng))
        elif sort == 1:
            lines.append(caption(sample_scene(rng), rng, told=bool(rng.random() < 0.5)))
        elif sort == 2:
            edit = sample_edit(rng)
            lines += [caption(edit.before, rng, told=False), edit.instruction]
        else:
            lines += [segment for segment in document(rng) if isinstance(segment, str)]
    return lines


def train_prompt_tokenizer(folder: Path, lines: list[str], vocabulary: int) -> None:
    """SentencePiece model and dictionary, as kosmosg.tokenizer reads them."""
    PromptTokenizer.train(lines, folder, vocab_size=vocabulary, normalization="identity")


def train_clip_tokenizer(lines: list[str], vocabulary: int, length: int) -> CLIPTokenizer:
    """CLIP's kind of byte-pair encoding (lower case, `</w>` ends a word) with a vocabulary of its own."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    letters = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    learner.train_from_iterator(lines, trainer)
    model = json.loads(learner.to_str())["model"]
    names = sorted(model["vocab"], key=model["vocab"].__getitem__)
    names += [letter + "</w>" for letter in letters if letter + "</w>" not in model["vocab"]]
    vocab = {name: i for i, name in enumerate([*names, START, END])}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)
    with tempfile.TemporaryDirectory() as folder:  # what it writes must be what it reads
        tokenizer.save_pretrained(folder)
        again = CLIPTokenizer.from_pretrained(folder)
        assert again(lines[:50]).input_ids == tokenizer(lines[:50]).input_ids
    return tokenizer
