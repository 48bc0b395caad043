"""Write tiny models with random weights in the real folder layouts, for tests."""

from pathlib import Path
from typing import Any

import tokenizers
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    ControlNetModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
)

IMAGE_SIZE = 64
LATENT_SIZE = 8
QUERIES = 24
CONDITION_WIDTH = 32
POOLED_WIDTH = 10
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


def write_model(folder: Path, tokenizer: Path, **aligner_changes: Any) -> Path:
    """Write an MLLM (width 32, 2 layers, 4 tokens per image) and M (24 queries, width 32) with fixed random weights."""
    from kosmosg.models.aligner import AlignerEncoder
    from kosmosg.models.kosmosg import KosmosG
    from kosmosg.models.mllm import MLLM
    from kosmosg.tokenizer import Tokenizer

    words = Tokenizer.from_pretrained(tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        mllm = MLLM(vocab_size=len(words), pad_id=words.pad_id, **mllm_sizes())
        aligner = AlignerEncoder(input_width=WIDTH, num_queries=QUERIES, **{**aligner_sizes(), **aligner_changes})
        KosmosG(mllm, aligner).save_pretrained(folder, tokenizer=words)
    return folder


def mllm_sizes() -> dict:
    """Constructor arguments of a tiny MLLM, except the vocabulary."""
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
    """Constructor arguments shared by M and N."""
    return {
        "width": CONDITION_WIDTH,
        "ffn_width": 64,
        "heads": 2,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "max_positions": 256,
    }


def write_stable_diffusion(
    folder: Path, prediction_type: str = "epsilon", pad_token: str = "<|endoftext|>", **unet: Any
) -> Path:
    """Write unet/ vae/ text_encoder/ tokenizer/ scheduler/ and model_index.json as diffusers does.

    Args:
        unet: differences from the U-Net of 1.5.
    """
    with torch.random.fork_rng():
        torch.manual_seed(2)
        tokenizer = clip_tokenizer(pad_token)
        StableDiffusionPipeline(
            unet=UNet2DConditionModel(**{**UNET, **unet}),
            vae=autoencoder(),
            text_encoder=CLIPTextModel(clip_text_config(tokenizer)),
            tokenizer=tokenizer,
            scheduler=DPMSolverMultistepScheduler(**NOISE_SCHEDULE, prediction_type=prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    return folder


def write_controlnet_and_lora(folder: Path, unet: UNet2DConditionModel) -> tuple[Path, Path]:
    """Write a ControlNet folder and a LoRA file for a U-Net, with weights that change its output."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = ControlNetModel.from_unet(unet, conditioning_channels=3)
        for parameter in [*network.controlnet_down_blocks.parameters(), *network.controlnet_mid_block.parameters()]:
            torch.nn.init.normal_(parameter, std=0.3)
        network.save_pretrained(folder / "controlnet")
        unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"], init_lora_weights=False))
        StableDiffusionPipeline.save_lora_weights(
            folder, get_peft_model_state_dict(unet), weight_name="lora.safetensors"
        )
        unet.delete_adapters("default")
    return folder / "controlnet", folder / "lora.safetensors"


NOISE_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
UNET: dict[str, Any] = {
    "sample_size": LATENT_SIZE,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": CONDITION_WIDTH,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}


def write_stable_diffusion_2(folder: Path, prediction_type: str) -> Path:
    """Write a Stable Diffusion 2.1: heads of equal width, linear projections, "!" as padding, any `prediction_type`."""
    unet = {"attention_head_dim": (2, 4), "use_linear_projection": True}
    return write_stable_diffusion(folder, prediction_type, "!", **unet)


def write_stable_diffusion_xl(folder: Path, force_zeros_for_empty_prompt: bool = True) -> Path:
    """Write a Stable Diffusion XL: two text models of widths 12 and 20 with different padding, pooled width 10."""
    width, pooled, numbers = 12, POOLED_WIDTH, 8
    unet = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": numbers,
        "projection_class_embeddings_input_dim": pooled + 6 * numbers,
        "transformer_layers_per_block": (2, 1),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
    }
    with torch.random.fork_rng():
        torch.manual_seed(2)
        first, second = clip_tokenizer(), clip_tokenizer("!")
        configs = [
            clip_text_config(first, hidden_size=width),
            clip_text_config(second, hidden_size=CONDITION_WIDTH - width, projection_dim=pooled, hidden_act="gelu"),
        ]
        StableDiffusionXLPipeline(
            unet=UNet2DConditionModel(**{**UNET, **unet}),
            vae=autoencoder(),
            text_encoder=CLIPTextModel(configs[0]),
            text_encoder_2=CLIPTextModelWithProjection(configs[1]),
            tokenizer=first,
            tokenizer_2=second,
            scheduler=EulerDiscreteScheduler(**NOISE_SCHEDULE),
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=False,
        ).save_pretrained(folder)
    return folder


def write_sana(folder: Path) -> Path:
    """Write a Sana: latents 8×8×8 for 64 px, and a Gemma with the words of `SENTENCES` and an unknown token."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        blocks = {"encoder": (8, 8, 8, 8), "decoder": (8, 8, 8, 8)}
        sizes: dict[str, Any] = {}
        for half, channels in blocks.items():
            sizes |= {f"{half}_block_types": "ResBlock", f"{half}_block_out_channels": channels}
            sizes |= {f"{half}_layers_per_block": (1,) * 4, f"{half}_qkv_multiscales": ((),) * 4}
        vae = AutoencoderDC(latent_channels=8, scaling_factor=0.4, **sizes)
        transformer = SanaTransformer2DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=CONDITION_WIDTH,
            sample_size=LATENT_SIZE,
            timestep_scale=0.5,
        )
        names = ["<pad>", "<bos>", "<unk>", *sorted({word for text in SENTENCES for word in text.lower().split()})]
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
        words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        words.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
        gemma = Gemma2Config(
            vocab_size=len(names),
            hidden_size=CONDITION_WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            pad_token_id=0,
            bos_token_id=1,
        )
        SanaPipeline(
            tokenizer=PreTrainedTokenizerFast(
                tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>"
            ),
            text_encoder=Gemma2Model(gemma),
            vae=vae,
            transformer=transformer,
            scheduler=DPMSolverMultistepScheduler(
                use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
            ),
        ).save_pretrained(folder)
    return folder


def clip_text_config(tokenizer: CLIPTokenizer, **changes: Any) -> CLIPTextConfig:
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": CONDITION_WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": QUERIES,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(**{**sizes, **changes})


def autoencoder() -> AutoencoderKL:
    blocks = (8, 8, 8, 8)
    return AutoencoderKL(
        sample_size=IMAGE_SIZE,
        block_out_channels=blocks,
        down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
        layers_per_block=1,
        norm_num_groups=4,
    )


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP tokenizer with a vocabulary of single letters, without merges."""
    letters = [chr(code) for code in range(33, 127)]
    names = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=QUERIES, pad_token=pad_token
    )


def write_kosmos2(folder: Path, tokenizer: Path, **saving) -> Path:
    """Write a Kosmos-2 folder as transformers does, with `mllm_sizes` and four patches; no weight has a neutral value.

    Args:
        saving: options of save_pretrained, for example max_shard_size.
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


# Byte-level words of one letter, and the special tokens of Qwen's tokenizers.
QWEN_TOKENS = (
    *("<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    *("<image>", "<video>"),
)


def write_language_model(folder: Path, family: str) -> Path:
    """Write a vision-language model folder as on the hub, with width 48, 3 layers and random weights.

    Args:
        family: qwen2_5_vl, qwen3_vl (with deepstack) or llava_onevision.
    """
    import json

    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessorPil,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2Tokenizer,
        Qwen2VLImageProcessorPil,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
    )

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = Qwen2Tokenizer(
        vocab={letter: number for number, letter in enumerate(letters)},
        merges=[],
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(QWEN_TOKENS),
    )
    words.save_pretrained(folder)
    ids: dict[str, Any] = {token: words.convert_tokens_to_ids(token) for token in QWEN_TOKENS}
    text = {
        "vocab_size": len(words),
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
    }
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 48}
    special = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    with torch.random.fork_rng():
        torch.manual_seed(4)
        if family == "qwen2_5_vl":
            vision |= {"patch_size": 8, "window_size": 32, "fullatt_block_indexes": [1]}
            config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special)
            model = Qwen2_5_VLForConditionalGeneration(config)
            images = Qwen2VLImageProcessorPil(patch_size=8, min_pixels=16**2, max_pixels=64**2)
        elif family == "qwen3_vl":
            vision |= {"patch_size": 8, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
            text |= {"head_dim": 12}
            text["rope_parameters"] = {**text["rope_parameters"], "mrope_interleaved": True}
            model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **special))
            images = Qwen2VLImageProcessorPil(patch_size=8, min_pixels=16**2, max_pixels=64**2)
        else:
            text |= {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
            vision = {
                "model_type": "siglip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
                "vision_use_head": False,
            }
            sides = [[16, 16], [16, 32], [32, 16]]
            config = LlavaOnevisionConfig(
                text_config=text,
                vision_config=vision,
                image_grid_pinpoints=sides,
                image_token_index=ids["<image>"],
                video_token_index=ids["<video>"],
            )
            model = LlavaOnevisionForConditionalGeneration(config)
            images = LlavaOnevisionImageProcessorPil(size={"height": 16, "width": 16}, image_grid_pinpoints=sides)
            values = {
                "processor_class": "LlavaOnevisionProcessor",
                "num_image_tokens": 16,
                "vision_feature_select_strategy": "full",
            }
            (folder / "processor_config.json").write_text(json.dumps(values))
    images.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
