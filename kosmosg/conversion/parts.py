"""Build the parts of a model folder on the meta device, compare them with weights, and write them."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.utils.constants import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from kosmosg.conversion.names import current_name, released_name
from kosmosg.conversion.reader import ConversionError
from kosmosg.conversion.weights import Weights
from kosmosg.models.aligner import AlignerDecoder, AlignerEncoder
from kosmosg.models.mllm import MLLM
from kosmosg.models.storage import CONFIG_FILE

OURS = {"mllm": MLLM, "aligner": AlignerEncoder, "aligner_decoder": AlignerDecoder}
DIFFUSERS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
TRANSFORMERS = {"text_encoder": (CLIPTextModel, CLIPTextConfig), "vision": (CLIPVisionModel, CLIPVisionConfig)}
WEIGHTS = (*OURS, *DIFFUSERS, "text_encoder")
PIPELINE = ("mllm", "aligner", "tokenizer", "unet", "vae", "scheduler")
RECORD = "conversion.json"
MARKS = (RECORD, "model_index.json", f"mllm/{CONFIG_FILE}")  # a model folder contains at least one of these
NAMED = 5  # tensors listed in a message


def require_free(target: Path, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Check that `target` may be written.

    Args:
        inputs: files and folders that are read; they must not be inside `target`.

    Raises:
        ConversionError: `target` exists and `overwrite` is off, is not a model folder, or contains an input.
    """
    if not (target.exists() or target.is_symlink()):
        return
    if not overwrite:
        raise ConversionError(f"'{target}' exists; give another name, or --overwrite to replace it.")
    for path in inputs:
        if path.exists() and path.resolve().is_relative_to(target.resolve()):
            raise ConversionError(f"'{path}' lies in '{target}', which --overwrite would replace.")
    if target.is_dir() and any(target.iterdir()) and not any((target / mark).exists() for mark in MARKS):
        raise ConversionError(
            f"'{target}' is not a model folder (it has none of {', '.join(MARKS)}); --overwrite does not replace it."
        )


def build(part: str, config: dict[str, Any]) -> nn.Module:
    """Build a part with shapes but without values, on the meta device."""
    with torch.device("meta"):
        if part in OURS:
            return OURS[part](**{key: value for key, value in config.items() if not key.startswith("_")})
        if part in DIFFUSERS:
            return DIFFUSERS[part].from_config(config)
        kind, settings = TRANSFORMERS[part]
        return kind(settings.from_dict(config))


def expected_shapes(part: str, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor, by its name in the part's file."""
    return {current_name(part, name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def require_exact(
    part: str, model: nn.Module, weights: Weights, hint: str = "", named: Callable[[str], str] | None = None
) -> None:
    """Check that the names and shapes of weights are exactly those of the model.

    Args:
        hint: advice appended to the message.
        named: maps our name of a tensor to its name in the source; by default that of released checkpoints.

    Raises:
        ConversionError: tensors are missing, left over or of another shape; names the first few.
    """
    expected, actual = expected_shapes(part, model), weights.shapes
    quoted = partial(quoted_name, part) if named is None else lambda name: f"'{named(name)}'"
    wrong = {
        "missing": [quoted(name) for name in expected if name not in actual],
        "left over": [quoted(name) for name in actual if name not in expected],
        "of another shape": [
            f"{quoted(name)} {list(actual[name])} for {list(size)}"
            for name, size in expected.items()
            if actual.get(name, size) != size
        ],
    }
    wrong = {kind: names for kind, names in wrong.items() if names}
    if wrong:
        text = "; ".join(f"{len(names)} {kind}, such as {', '.join(names[:NAMED])}" for kind, names in wrong.items())
        raise ConversionError(f"{weights.origin}: the tensors of {part} do not fit its sizes: {text}.{hint}")


def quoted_name(part: str, name: str) -> str:
    """Return the quoted name of a tensor in released checkpoints or in files of OpenAI's CLIP."""
    if part == "vision":
        return f"'{str(released_name('mllm', f'vision.clip.{name}')).removeprefix('img_model.')}'"
    return f"'{released_name(part, name) or name}'"


def write_part(folder: Path, model: Any, weights: Weights, dtype: torch.dtype | None) -> None:
    """Write config.json and weights in the format of the part's save_pretrained."""
    folder.mkdir(parents=True)
    if isinstance(model, ConfigMixin):
        model.save_config(str(folder))
        weights.save(folder / SAFETENSORS_WEIGHTS_NAME, dtype)
        return
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(dtype or next(iter(weights.dtypes.values()))).removeprefix("torch.")
    model.config.save_pretrained(folder)
    weights.save(folder / "model.safetensors", dtype)
