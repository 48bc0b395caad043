"""Training data of the tiny models: images, drawn once and cached, with captions and labels; and the tokenizers.

Toyland has two vocabularies, SentencePiece for the MLLM and byte-pair encoding for CLIP, both trained on its own texts.
"""

import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer

from datamodules.toyland.brush import HUES, MARKINGS, PATTERNS
from datamodules.toyland.kinds import ACCESSORIES, KINDS, PROPERTIES
from datamodules.toyland.language import caption, document, noun_phrase, sample_edit, story
from datamodules.toyland.scene import Scene, Subject, crop, render, sample_scene
from datamodules.toyland.settings import LIGHTS, SETTINGS, STYLES
from kosmosg.files import replaced
from kosmosg.tokenizer import Tokenizer as PromptTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
POOL_STREAM = 0x9A27
"""Random stream of the pool, so that its subjects differ from those of all data sets."""

COLOURS = [*HUES, "white", "gray", "black"]
LABELS = {
    "kind": list(KINDS),
    "colour": COLOURS,
    "pattern": list(PATTERNS),
    "second colour": COLOURS,
    "marking": list(MARKINGS),
    "setting": list(SETTINGS),
    "light": list(LIGHTS),
    "style": list(STYLES),
    "dress": ["", *ACCESSORIES, *PROPERTIES],
}
LOOKS = 5
"""Number of labels, the first ones, that describe the subject itself."""


@dataclass
class Pool:
    """Scenes, each with two crops of its first subject."""

    images: Tensor
    """(N, 3, S, S) uint8"""
    crops: Tensor
    """(N, 2, 3, S, S) uint8: the subject on white, and with its background"""
    captions: list[str]
    """Captions of the scenes."""
    told: list[str]
    """Captions of the first subjects, with looks: "a red boot with yellow stripes"."""
    labels: Tensor
    """(N, 9): index into each of LABELS, of the first subject and the scene"""
    subjects: Tensor
    """(N,): number of subjects in the scene"""
    tints: Tensor
    """(N, 6): body and second colour of the first subject, RGB in [0, 1]"""

    def __len__(self) -> int:
        return len(self.captions)


def pixels(images: Tensor) -> Tensor:
    """uint8 → float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1.0)


def augmented(images: Tensor, generator: torch.Generator, shift: int = 2) -> Tensor:
    """Randomly flip each image and shift it by up to `shift` pixels, repeating its border."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    size = images.shape[-1]
    across, down = (torch.randint(-shift, shift + 1, (2, len(images), 1), generator=generator)
                    + torch.arange(size)).clamp(0, size - 1)  # fmt: skip
    rows = torch.arange(len(images))[:, None, None]
    return images[rows, :, down[:, :, None], across[:, None]].permute(0, 3, 1, 2)


def _draw(
    number: int, seed: int, looks_share: float
) -> tuple[np.ndarray, np.ndarray, str, str, list[int], int, list[float]]:
    rng = np.random.default_rng([seed, POOL_STREAM, number])
    crops = [None]
    while None in crops:  # draw another scene if the subject is hidden
        scene = sample_scene(rng)
        rendered = render(scene)
        crops = [crop(rendered, 0, white=white) for white in (True, False)]
    words = caption(scene, rng, with_looks=bool(rng.random() < looks_share), with_article=bool(rng.random() < 0.85))
    first = scene.placed[0]
    look = first.subject.look
    if first.property in ("red", "purple"):
        look = look.recolored(first.property)
    values = (
        first.subject.kind, look.body.word, look.pattern, look.second.word, look.marking,
        scene.setting, scene.light, scene.style, first.accessory or first.property or "",
    )  # fmt: skip
    labels = [names.index(value) for names, value in zip(LABELS.values(), values, strict=True)]
    looks = noun_phrase(first, with_looks=True, suffixed=bool(rng.random() < 0.7))
    tints = [*look.body.rgb, *look.second.rgb]
    return np.asarray(rendered.image), np.stack(crops), words, looks, labels, len(scene.placed), tints


def draw_pool(folder: Path, count: int, seed: int, looks_share: float) -> Pool:
    """Draw `count` scenes, or read them from the cache in `folder`. `looks_share` of the captions describe looks."""
    path = folder / f"pool-{count}-{seed}-{looks_share}.pt"
    if not path.exists():
        rows = _parallel(partial(_draw, seed=seed, looks_share=looks_share), count)
        images, crops, captions, looks, labels, subjects, tints = zip(*rows, strict=True)
        content = {
            "images": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
            "crops": torch.from_numpy(np.stack(crops)).permute(0, 1, 4, 2, 3).contiguous(),
            "captions": list(captions),
            "told": list(looks),
            "labels": torch.tensor(labels),
            "subjects": torch.tensor(subjects),
            "tints": torch.tensor(tints, dtype=torch.float32),
        }
        _save(content, path)
    return Pool(**torch.load(path, weights_only=True))


def _draw_pair(number: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, POOL_STREAM + 1, number])
    subject = Subject.sample(rng)
    first: Scene = sample_scene(rng, [subject], plain=True)
    return np.stack([np.asarray(render(scene).image) for scene in (first, sample_scene(rng, [subject]))])


def draw_pairs(folder: Path, count: int, seed: int) -> Tensor:
    """Draw `count` subjects twice, in the studio and in another place and pose: (N, 2, 3, S, S) uint8."""
    path = folder / f"pairs-{count}-{seed}.pt"
    if not path.exists():
        rows = _parallel(partial(_draw_pair, seed=seed), count)
        _save({"pairs": torch.from_numpy(np.stack(rows)).permute(0, 1, 4, 2, 3).contiguous()}, path)
    return torch.load(path, weights_only=True)["pairs"]


def _parallel(function, count: int) -> list:
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        return list(workers.map(function, range(count), chunksize=128))


def _save(content: dict, path: Path) -> None:
    with replaced(path) as temporary:
        torch.save(content, temporary)


def sentences(count: int, seed: int) -> list[str]:
    """Draw lines of all kinds of text in Toyland's data sets."""
    rng = np.random.default_rng([seed, 0x7E17])
    lines = []
    for number in range(count):
        kind = number % 4
        if kind == 0:
            lines.append(story(rng))
        elif kind == 1:
            lines.append(caption(sample_scene(rng), rng, with_looks=bool(rng.random() < 0.5)))
        elif kind == 2:
            edit = sample_edit(rng)
            lines += [caption(edit.before, rng, with_looks=False), edit.instruction]
        else:
            lines += [segment for segment in document(rng) if isinstance(segment, str)]
    return lines


def train_prompt_tokenizer(folder: Path, lines: list[str], vocabulary: int) -> None:
    """Train the SentencePiece model and dictionary that kosmosg.tokenizer reads."""
    PromptTokenizer.train(lines, folder, vocab_size=vocabulary, normalization="identity")


def train_clip_tokenizer(lines: list[str], vocabulary: int, length: int) -> CLIPTokenizer:
    """Train a byte-pair encoding like CLIP's (lower case, `</w>` ends a word) with its own vocabulary."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    letters = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    bpe.train_from_iterator(lines, trainer)
    model = json.loads(bpe.to_str())["model"]
    names = sorted(model["vocab"], key=model["vocab"].__getitem__)
    names += [letter + "</w>" for letter in letters if letter + "</w>" not in model["vocab"]]
    vocab = {name: i for i, name in enumerate([*names, START, END])}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)
    with tempfile.TemporaryDirectory() as folder:  # check that it is the same after saving
        tokenizer.save_pretrained(folder)
        loaded = CLIPTokenizer.from_pretrained(folder)
        assert loaded(lines[:50]).input_ids == tokenizer(lines[:50]).input_ids
    return tokenizer
