"""Each part of a model folder: its class, built without memory to compare names and shapes, and its configuration."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from kosmosg.conversion.errors import ConversionError
from kosmosg.conversion.names import current_name, released_name
from kosmosg.conversion.weights import Shapes, Weights
from kosmosg.models.aligner import AlignerDecoder, AlignerEncoder
from kosmosg.models.mllm import MLLM
from kosmosg.models.storage import CONFIG_FILE

OURS = {"mllm": MLLM, "aligner": AlignerEncoder, "aligner_decoder": AlignerDecoder}
DIFFUSERS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
TRANSFORMERS = {"text_encoder": (CLIPTextModel, CLIPTextConfig), "vision": (CLIPVisionModel, CLIPVisionConfig)}
WEIGHTS = tuple([*OURS, *DIFFUSERS, "text_encoder"])
PIPELINE = ("mllm", "aligner", "tokenizer", "unet", "vae", "scheduler")
TOLD = 5


def build(part: str, config: dict[str, Any]) -> nn.Module:
    """The part with shapes but without values."""
    with torch.device("meta"):
        if part in OURS:
            return OURS[part](**{key: value for key, value in config.items() if not key.startswith("_")})
        if part in DIFFUSERS:
            return DIFFUSERS[part].from_config(config)
        kind, settings = TRANSFORMERS[part]
        return kind(settings.from_dict(config))


def read_config(folder: Path) -> dict[str, Any]:
    """A part's config.json.

    Raises:
        ConversionError: there is none, or it is no JSON object.
    """
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"'{file}' does not exist.") from error
    except ValueError as error:
        raise ConversionError(f"'{file}' is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConversionError(f"'{file}' holds {type(config).__name__} at its top; a configuration is a mapping.")
    return config


def expected_shapes(part: str, model: nn.Module) -> Shapes:
    """Names in the part's file, and shapes."""
    return {current_name(part, name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def require_exact(part: str, model: nn.Module, weights: Weights, hint: str = "") -> None:
    """Refuse weights whose names or shapes are not exactly the model's.

    Args:
        hint: what to do about it.

    Raises:
        ConversionError: tells the first few tensors that are missing, left over or of another shape.
    """
    expected, found = expected_shapes(part, model), weights.shapes
    wrong = {
        "missing": [told(part, name) for name in expected if name not in found],
        "left over": [told(part, name) for name in found if name not in expected],
        "of another shape": [
            f"{told(part, name)} {list(found[name])} for {list(expected[name])}"
            for name in expected
            if name in found and found[name] != expected[name]
        ],
    }
    if any(wrong.values()):
        said = "; ".join(f"{len(names)} {kind}, as {', '.join(names[:TOLD])}" for kind, names in wrong.items() if names)
        raise ConversionError(f"{weights.origin}: the tensors of {part} do not fit its sizes: {said}.{hint}")


def told(part: str, name: str) -> str:
    """A tensor by the name that it has in released checkpoints and in public CLIP files."""
    if part == "vision":
        return f"'{str(released_name('mllm', f'vision.clip.{name}')).removeprefix('img_model.')}'"
    return f"'{released_name(part, name) or name}'"


def write_part(folder: Path, model: nn.Module, weights: Weights, dtype: torch.dtype | None) -> None:
    """config.json and weights, as the part's own save_pretrained writes them."""
    folder.mkdir(parents=True)
    if isinstance(model, ConfigMixin):
        model.save_config(str(folder))
        weights.save(folder / diffusers.utils.SAFETENSORS_WEIGHTS_NAME, dtype)
        return
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(dtype or next(iter(weights.dtypes.values()))).removeprefix("torch.")
    model.config.save_pretrained(folder)
    weights.save(folder / "model.safetensors", dtype)
