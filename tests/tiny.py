"""Tiny random models in the real folder layouts, for tests: seconds to build, milliseconds to run."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

IMAGE_SIZE = 64
LATENT_SIZE = 8
QUERIES = 24
CONDITION_WIDTH = 32
IMAGE_TOKENS = 4
WIDTH = 32
VOCABULARY_LIMIT = 200

SENTENCES = [
    "a photo of a red fish on the beach",
    "a small dog with white spots in the snow",
    "a green bird wearing a hat at night",
    "a fish and a dog in the garden",
    "a wooden boat with yellow stripes on the water",
    "a sketch of a cat, red",
    "make it night and add a hat to the bird",
    "The dog sleeps in the garden beside the boat.",
    "Two birds look at a fish. The fish swims away!",
    "a toy car in the jungle, a toy car in the city",
]


def write_tokenizer(folder: Path) -> Path:
    from kosmosg.tokenizer import Tokenizer

    Tokenizer.train(SENTENCES, folder, vocab_size=VOCABULARY_LIMIT)
    return folder


def write_model(folder: Path, tokenizer: Path) -> Path:
    """MLLM (width 32, 2 layers, 4 slots per image) and M (24 queries, width 32) with fixed random weights."""
    from kosmosg.models.aligner import AlignerEncoder
    from kosmosg.models.kosmosg import KosmosG
    from kosmosg.models.mllm import MLLM
    from kosmosg.tokenizer import Tokenizer

    words = Tokenizer.from_pretrained(tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        mllm = MLLM(vocab_size=len(words), pad_id=words.pad_id, **mllm_sizes())
        aligner = AlignerEncoder(input_width=WIDTH, num_queries=QUERIES, **aligner_sizes())
        KosmosG(mllm, aligner).save_pretrained(folder, tokenizer=words)
    return folder


def mllm_sizes() -> dict:
    """Constructor arguments of a tiny MLLM, vocabulary aside."""
    vision = {
        "image_size": IMAGE_SIZE,
        "patch_size": 16,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
    return {
        "width": WIDTH,
        "layers": 2,
        "heads": 2,
        "ffn_width": 64,
        "image_tokens": IMAGE_TOKENS,
        "vision_config": vision,
        "dropout": 0.1,
    }


def aligner_sizes() -> dict:
    """Constructor arguments that M and N share."""
    return {
        "width": CONDITION_WIDTH,
        "ffn_width": 64,
        "heads": 2,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "max_positions": 256,
    }


def write_stable_diffusion(folder: Path) -> Path:
    """unet/ vae/ text_encoder/ tokenizer/ scheduler/ and model_index.json as diffusers writes them."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        tokenizer = clip_tokenizer()
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=CONDITION_WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=QUERIES,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        unet = UNet2DConditionModel(
            sample_size=LATENT_SIZE,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=CONDITION_WIDTH,
            attention_head_dim=2,
            norm_num_groups=8,
        )
        blocks = (8, 8, 8, 8)
        vae = AutoencoderKL(
            sample_size=IMAGE_SIZE,
            block_out_channels=blocks,
            down_block_types=("DownEncoderBlock2D",) * len(blocks),
            up_block_types=("UpDecoderBlock2D",) * len(blocks),
            layers_per_block=1,
            norm_num_groups=4,
        )
        scheduler = DPMSolverMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        )
        StableDiffusionPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(text),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    return folder


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is single letters, without merges."""
    letters = [chr(code) for code in range(33, 127)]
    names = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=QUERIES)


def write_kosmos2(folder: Path, tokenizer: Path, **saving) -> Path:
    """A Kosmos-2 folder as transformers writes it, of `mllm_sizes` and four patches; no weight has a neutral value.

    Args:
        saving: options of save_pretrained, as max_shard_size.
    """
    import shutil

    from transformers import (
        CLIPImageProcessorPil,
        Kosmos2Config,
        Kosmos2ForConditionalGeneration,
        Kosmos2Processor,
        XLMRobertaTokenizer,
    )

    from kosmosg.tokenizer import SENTENCEPIECE_FILE

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(tokenizer / SENTENCEPIECE_FILE, folder)
    images = CLIPImageProcessorPil(size=(IMAGE_SIZE, IMAGE_SIZE), crop_size=IMAGE_SIZE)
    words = XLMRobertaTokenizer.from_pretrained(str(folder))
    Kosmos2Processor(images, words, num_patch_index_tokens=4).save_pretrained(folder)
    sizes = mllm_sizes()
    config = Kosmos2Config(
        text_config={
            "vocab_size": len(words),
            "embed_dim": sizes["width"],
            "layers": sizes["layers"],
            "attention_heads": sizes["heads"],
            "ffn_dim": sizes["ffn_width"],
        },
        vision_config=sizes["vision_config"],
        latent_query_num=sizes["image_tokens"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Kosmos2ForConditionalGeneration(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder, **saving)
    return folder
