"""Build the parts of a model from its configuration, with new weights or those of an earlier stage."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers import CLIPVisionModel

from kosmosg.models.aligner import Aligner, AlignerDecoder, AlignerEncoder, LinearAligner
from kosmosg.models.image_decoder import ImageDecoder, Parts
from kosmosg.models.mllm import MLLM, MultimodalLM
from kosmosg.models.model_config import ModelConfig, VisionConfig
from kosmosg.models.published import CONFIGS
from kosmosg.models.sana import Sana
from kosmosg.models.stable_diffusion import StableDiffusion
from kosmosg.models.stable_diffusion_xl import StableDiffusionXL
from kosmosg.models.storage import (
    CHANGEABLE,
    Part,
    find_model,
    fingerprint,
    load_network,
    load_part,
    require_class,
    require_same_config,
)
from kosmosg.models.vision_language_model import NETWORK, LanguageProcessor, VisionLanguageModel, language_config
from kosmosg.tokenizer import Tokenizer

LAYER_NORM_EPS = 1e-5
# By the pipeline name in model_index.json; the first is the default for folders without that file.
IMAGE_DECODERS: dict[str, type[ImageDecoder]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "SanaPipeline": Sana,
}


def image_decoder_index(source: str | Path) -> dict[str, Any]:
    """Return model_index.json of a diffusers folder or hub id, with a key of `IMAGE_DECODERS` as `_class_name`.

    For folders of `KosmosGPipeline` this is the family of their image decoder.

    Raises:
        ValueError: there is no image decoder for the pipeline.
    """
    index: dict[str, Any] = {}
    is_folder = Path(source).is_dir()
    if str(source) in CONFIGS and not is_folder:  # no request to the hub, so that a dry run needs no network
        index = CONFIGS[str(source)]["model_index"]
    elif not is_folder or (Path(source) / DiffusionPipeline.config_name).is_file():
        with contextlib.suppress(OSError):  # if the hub id cannot be reached, loading its weights raises the error
            index = DiffusionPipeline.load_config(str(source))  # type: ignore[assignment]
    default = next(iter(IMAGE_DECODERS))
    name = index.get("family", default if "mllm" in index else index.get("_class_name", default))
    name = name[-1] if isinstance(name, list) else name  # [module, class] if the folder has its own code, never run
    if name not in IMAGE_DECODERS:
        raise ValueError(f"model.image_decoder='{source}' is a {name}; allowed: {', '.join(IMAGE_DECODERS)}.")
    return {**index, "_class_name": name}


def image_decoder_class(source: str | Path) -> type[ImageDecoder]:
    """Return the image decoder class of a diffusers folder or hub id; errors as `image_decoder_index`."""
    return IMAGE_DECODERS[image_decoder_index(source)["_class_name"]]


def load_image_decoder(source: str | Path, parts: Parts = "all", **options: Any) -> ImageDecoder:
    """Load the image decoder of a diffusers folder or hub id; arguments as `ImageDecoder.from_pretrained`."""
    return image_decoder_class(source).from_pretrained(source, parts, **options)


def build_tokenizer(config: ModelConfig) -> Tokenizer | LanguageProcessor:
    """Load the tokenizer or processor that `build_mllm`'s model needs."""
    if config.language_model is not None:
        return LanguageProcessor.from_pretrained(config.language_model)
    return Tokenizer.from_pretrained(Path(config.tokenizer))


def build_mllm(
    config: ModelConfig, tokenizer: Tokenizer | LanguageProcessor, init_from: str | Path | None = None
) -> MultimodalLM:
    """Build the MLLM of `config` with the vocabulary of `tokenizer`.

    Without `init_from`, the weights are those of `config.language_model`, or else random except for a vision encoder
    loaded from `config.vision_weights`.

    Args:
        init_from: model folder or run folder to load the weights from.

    Raises:
        FileNotFoundError: `init_from` holds no model.
        ValueError: the weights belong to another model; names the sizes that differ.
    """
    if config.language_model is not None:
        return build_language_model(config, init_from)
    assert not isinstance(tokenizer, LanguageProcessor)
    mllm = config.mllm
    arguments = {
        "vocab_size": len(tokenizer),
        "width": mllm.width,
        "layers": mllm.layers,
        "heads": mllm.heads,
        "ffn_width": mllm.ffn_width,
        "image_tokens": mllm.image_tokens,
        "vision_config": vision_config(mllm.vision),
        "dropout": mllm.dropout,
        "xpos": mllm.xpos,
        "pad_id": tokenizer.pad_id,
        "bos_id": tokenizer.bos_id,
        "image_fit": mllm.image_fit,
    }
    model = build_part(MLLM, arguments, init_from, "mllm")
    if init_from is None:
        with torch.no_grad():
            model.resampler.projection.weight.mul_(mllm.resampler_gain)
        if config.vision_weights is not None:
            load_vision_weights(model, config.vision_weights)
    return model


def build_language_model(config: ModelConfig, init_from: str | Path | None) -> VisionLanguageModel:
    source, layer = str(config.language_model), config.hidden_layer
    options = {"hidden_layer": layer, "max_image_pixels": config.max_image_pixels}
    if init_from is None:
        return VisionLanguageModel.load(source, **options).train()
    folder = find_model(init_from) / "mllm"
    require_class(VisionLanguageModel, folder)
    require_same_config(folder, {"source": source, "hidden_layer": layer})
    model = VisionLanguageModel.from_pretrained(folder)
    model.register_to_config(**options)
    return model.train()


def mllm_fingerprint(
    config: ModelConfig, init_from: str | Path | None, wanted: Callable[[str], bool] = lambda _: True
) -> dict[str, str]:
    """Return fingerprints of everything that the hidden states of `build_mllm`'s model depend on, except the prompts.

    Args:
        wanted: selects weights by name.

    Raises:
        FileNotFoundError: `init_from` holds no model.
        ValueError: the weights would be random.
    """
    folder = None if init_from is None else find_model(init_from) / "mllm"
    if config.language_model is not None:
        trained = None if folder is None else folder / NETWORK
        source = trained if trained is not None and trained.is_dir() else config.language_model
        return {
            "network": fingerprint(source, wanted=wanted),
            "tokenizer": fingerprint(config.language_model, wanted=lambda _: False),
            "layer": str(config.hidden_layer),
        }
    if folder is None:
        raise ValueError("init_from is null, so the MLLM has random weights, whose outputs cannot be cached.")
    return {"network": fingerprint(folder, wanted=wanted), "tokenizer": fingerprint(config.tokenizer)}


def mllm_width(config: ModelConfig) -> int:
    """Return `D`, the width of the MLLM's hidden states."""
    if config.language_model is None:
        return config.mllm.width
    return language_config(config.language_model).get_text_config().hidden_size


def build_aligner(config: ModelConfig, init_from: str | Path | None = None) -> Aligner:
    """Build the aligner of `config`, M or its linear baseline; see `build_mllm` for `init_from` and the errors."""
    aligner = config.aligner
    if aligner.kind == "linear":
        sizes = {"input_width": mllm_width(config), "width": aligner.width, "num_queries": aligner.num_queries}
        return build_part(LinearAligner, sizes, init_from, "aligner")
    arguments = {
        "input_width": mllm_width(config),
        "width": aligner.width,
        "ffn_width": aligner.ffn_width,
        "heads": aligner.heads,
        "encoder_layers": aligner.encoder_layers,
        "decoder_layers": aligner.decoder_layers,
        "num_queries": aligner.num_queries,
        "max_positions": aligner.max_positions,
        "pooled_width": aligner.pooled_width,
    }
    return build_part(AlignerEncoder, arguments, init_from, "aligner")


def build_aligner_decoder(config: ModelConfig, init_from: str | Path | None = None) -> AlignerDecoder:
    """Build N of `config`; see `build_mllm` for `init_from` and the errors."""
    decoder = config.aligner_decoder
    arguments = {
        "output_width": mllm_width(config),
        "width": config.aligner.width,
        "ffn_width": decoder.ffn_width,
        "heads": decoder.heads,
        "encoder_layers": decoder.encoder_layers,
        "decoder_layers": decoder.decoder_layers,
        "max_positions": decoder.max_positions,
    }
    return build_part(AlignerDecoder, arguments, init_from, "aligner_decoder")


def build_part(kind: type[Part], arguments: dict[str, Any], init_from: str | Path | None, name: str) -> Part:
    """Build `kind(**arguments)`, with the weights of the part `name` of `init_from` if given."""
    if init_from is None:
        return kind(**arguments)
    folder = find_model(init_from) / name
    require_class(kind, folder)
    require_same_config(folder, arguments)
    # dropout and image_fit are taken from the configuration and may differ from those of the earlier stage.
    saved = load_part(kind, folder)
    if all(saved.config.get(name) == arguments.get(name) for name in CHANGEABLE):
        return saved.train()
    model = kind(**arguments)
    model.load_state_dict(saved.state_dict())
    return model


def vision_config(vision: VisionConfig) -> dict[str, Any]:
    """Return the fields of `transformers.CLIPVisionConfig`."""
    return {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_size": vision.width,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "intermediate_size": vision.ffn_width,
        "hidden_act": vision.activation,
        "layer_norm_eps": LAYER_NORM_EPS,
    }


def load_vision_weights(model: MLLM, weights: str) -> None:
    """Load the vision encoder of a CLIP folder or hub id into `model`.

    Raises:
        ValueError: the sizes differ, or weights are missing or not finite.
    """
    clip = load_network(CLIPVisionModel, weights)
    expected = model.config.vision_config
    different = [
        f"{key} is {getattr(clip.config, key)!r} there and {value!r} in the configuration"
        for key, value in expected.items()
        if getattr(clip.config, key) != value
    ]
    if different:
        raise ValueError(f"model.vision_weights='{weights}' does not fit model.mllm.vision: {'; '.join(different)}.")
    model.vision.clip.load_state_dict(clip.state_dict())
