"""Tiny models in the real folder layouts. The language models are built to say one thing: each word calls the next."""

from itertools import pairwise
from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    BlipImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from tests import tiny

CAPTION = "dog beside red car"
ANSWER = "dog , car"
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "ANSWER", "dog", "beside", "red", "car", ",", "x1", "x2", "x3"]
CHAT_TEMPLATE = "{{ messages[0]['content'] }} ANSWER"
SIDE = 32
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 16,
}


def write_all(folder: Path) -> dict[str, Path]:
    """The four models of configs/curation/open_images.yaml by stage; none of them drops an image."""
    return {
        "safety": write_safety_checker(folder / "safety", strict=False),
        "caption": write_blip2(folder / "caption"),
        "entities": write_language_model(folder / "entities"),
        "masks": write_clipseg(folder / "masks"),
    }


def write_blip2(folder: Path) -> Path:
    """Captions every image with CAPTION."""
    config = Blip2Config(
        vision_config=VISION,
        qformer_config=VISION | {"encoder_hidden_size": 16, "vocab_size": 8},
        text_config=opt_config().to_dict(),
        num_query_tokens=4,
        image_token_index=WORDS.index("<image>"),
    )
    model = Blip2ForConditionalGeneration(config)
    teach(model.language_model, ["<s>", *CAPTION.split(), "</s>"])
    model.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


def write_language_model(folder: Path) -> Path:
    """Answers ANSWER to everything."""
    model = OPTForCausalLM(opt_config())
    teach(model, ["ANSWER", *ANSWER.split(), "</s>"])
    model.save_pretrained(folder)
    tokenizer = words()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def write_clipseg(folder: Path) -> Path:
    """Random heat, around one half."""
    tokenizer = tiny.clip_tokenizer()
    text = VISION | {"vocab_size": len(tokenizer), "max_position_embeddings": tiny.QUERIES}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = CLIPSegConfig(
        text_config=text | {"pad_token_id": tokenizer.pad_token_id},
        vision_config=VISION,
        projection_dim=16,
        extract_layers=[0, 1],
        reduce_dim=8,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    CLIPSegForImageSegmentation(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_safety_checker(folder: Path, *, strict: bool) -> Path:
    """Stable Diffusion's checker that finds every image unsafe (`strict`), or none."""
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=VISION, text_config=VISION, projection_dim=16))
    # A cosine lies in -1 … 1; the thresholds lie outside.
    for weights in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        weights.data.fill_(-2.0 if strict else 2.0)
    checker.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        folder
    )
    return folder


def write_classifier(folder: Path, unsafe: float) -> Path:
    """An image classifier that gives `nsfw` the probability `unsafe`."""
    model = ViTForImageClassification(
        ViTConfig(**VISION, id2label={0: "normal", 1: "nsfw"}, label2id={"normal": 0, "nsfw": 1})
    )
    model.classifier.weight.data.zero_()
    model.classifier.bias.data = torch.tensor([1 - unsafe, unsafe]).log()
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def words() -> PreTrainedTokenizerFast:
    """One id for each of WORDS."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=["<image>", "ANSWER"], **special
    )


def opt_config() -> OPTConfig:
    """As wide as the vocabulary: an embedding is one word."""
    return OPTConfig(
        vocab_size=len(WORDS),
        hidden_size=len(WORDS),
        word_embed_proj_dim=len(WORDS),
        ffn_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )


def teach(model: OPTForCausalLM, chain: list[str]) -> None:
    """Silence attention and feed-forward, so that a word alone decides on the next; teach the chain."""
    decoder = model.model.decoder
    silent = [decoder.embed_positions, decoder.layers[0].self_attn.out_proj, decoder.layers[0].fc2]
    for module in silent:
        for parameter in module.parameters():
            parameter.data.zero_()
    decoder.embed_tokens.weight.data = 5 * torch.eye(len(WORDS))
    model.lm_head.weight.data.zero_()
    for word, following in pairwise(chain):
        model.lm_head.weight.data[WORDS.index(following), WORDS.index(word)] = 1.0
