"""Published configurations of image decoders and vision-language models by hub id.

Dry runs use them instead of downloads, and conversion uses them for checkpoints without a configuration.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STABLE_DIFFUSION_1_5 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
STABLE_DIFFUSION_2_1 = "stabilityai/stable-diffusion-2-1"
STABLE_DIFFUSION_2_1_BASE = "stabilityai/stable-diffusion-2-1-base"
STABLE_DIFFUSION_XL = "stabilityai/stable-diffusion-xl-base-1.0"
SANA_512 = "Efficient-Large-Model/Sana_1600M_512px_diffusers"
UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT_ENCODER = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "vocab_size": 49408,
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
# OpenCLIP's ViT-H text model without its last layer, because 2.1 reads the penultimate state after the final norm.
TEXT_ENCODER_2 = {
    **TEXT_ENCODER,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
UNET_2 = {
    **UNET,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
# The first text model is that of 1.5, the second is OpenCLIP's ViT-bigG.
TEXT_ENCODER_XL_2 = {
    **TEXT_ENCODER,
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
UNET_XL = {
    **UNET,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 1280 + 6 * 256,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
DC_AE_BLOCKS = [*["ResBlock"] * 3, *["EfficientViTBlock"] * 3]
DC_AE = {
    "_class_name": "AutoencoderDC",
    "decoder_block_types": DC_AE_BLOCKS,
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "downsample_block_type": "conv",
    "encoder_block_types": DC_AE_BLOCKS,
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "latent_channels": 32,
    "scaling_factor": 0.41407,
    "upsample_block_type": "interpolate",
}
SANA_SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    STABLE_DIFFUSION_1_5: {
        "model_index": {"_class_name": "StableDiffusionPipeline"},
        "unet": UNET,
        "vae": VAE,
        "text_encoder": TEXT_ENCODER,
        "scheduler": SCHEDULER,
    },
    STABLE_DIFFUSION_2_1: {
        "model_index": {"_class_name": "StableDiffusionPipeline"},
        "unet": UNET_2,
        "vae": {**VAE, "sample_size": 768},
        "text_encoder": TEXT_ENCODER_2,
        "scheduler": {**SCHEDULER, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    },
    STABLE_DIFFUSION_2_1_BASE: {
        "model_index": {"_class_name": "StableDiffusionPipeline"},
        "unet": {**UNET_2, "sample_size": 64, "upcast_attention": False},
        "vae": VAE,
        "text_encoder": TEXT_ENCODER_2,
        "scheduler": {**SCHEDULER, "prediction_type": "epsilon"},
    },
    STABLE_DIFFUSION_XL: {
        "model_index": {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True},
        "unet": UNET_XL,
        "vae": {**VAE, "sample_size": 1024, "scaling_factor": 0.13025},
        "text_encoder": TEXT_ENCODER,
        "text_encoder_2": TEXT_ENCODER_XL_2,
        "scheduler": {**SCHEDULER, "_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon"},
    },
    SANA_512: {
        "model_index": {"_class_name": "SanaPipeline"},
        "transformer": {"_class_name": "SanaTransformer2DModel", "sample_size": 16},  # other defaults are those of 1.6B
        "vae": DC_AE,
        "text_encoder": {"model_type": "gemma2"},  # the defaults are those of Gemma 2 2B
        "scheduler": SANA_SCHEDULER,
    },
}
QWEN_2_5_VL_3B = "Qwen/Qwen2.5-VL-3B-Instruct"
QWEN_3_VL_4B = "Qwen/Qwen3-VL-4B-Instruct"
QWEN_TEXT = {
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "num_hidden_layers": 36,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    QWEN_2_5_VL_3B: {
        "model_type": "qwen2_5_vl",
        "text_config": {
            **QWEN_TEXT,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "max_position_embeddings": 128000,
            "max_window_layers": 70,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048, "tokens_per_second": 2},
        "tie_word_embeddings": True,
    },
    QWEN_3_VL_4B: {
        "model_type": "qwen3_vl",
        "text_config": {
            **QWEN_TEXT,
            "head_dim": 128,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "max_position_embeddings": 262144,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_interleaved": True,
                "mrope_section": [24, 20, 20],
            },
        },
        "vision_config": {
            "deepstack_visual_indexes": [5, 11, 17],
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "out_hidden_size": 2560,
        },
        "tie_word_embeddings": True,
    },
}


def config_file(part: str) -> str:
    """Return the path of a component's configuration in a diffusers folder; `part` may be "model_index"."""
    if part == "model_index":
        return f"{part}.json"
    return f"{part}/scheduler_config.json" if part == "scheduler" else f"{part}/config.json"


def decoder_configs(source: str | Path, parts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the configurations of components of a diffusers folder or published hub id.

    Raises:
        ValueError: the configuration of the hub id is not listed here.
    """
    folder = Path(source)
    if folder.is_dir():
        return {part: json.loads((folder / config_file(part)).read_text()) for part in parts}
    if str(source) not in CONFIGS:
        known = ", ".join(f"'{name}'" for name in CONFIGS)
        raise ValueError(
            f"model.image_decoder is '{source}', whose sizes a dry run does not know; allowed: a folder, or {known}"
        )
    return {part: CONFIGS[str(source)][part] for part in parts}
