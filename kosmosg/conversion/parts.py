"""Each part of a model folder: its class, built without memory to compare names and shapes; configuration; folder."""

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
MARKS = (RECORD, "model_index.json", f"mllm/{CONFIG_FILE}")  # one of them tells a model folder from any other
NAMED = 5


def require_free(target: Path, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse to write where something stands.

    Args:
        inputs: files and folders that are read, which must not be inside `target`.

    Raises:
        ConversionError: `target` exists and `overwrite` is off, is no model folder, or holds an input.
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
            f"'{target}' is no model folder (it has none of {', '.join(MARKS)}); --overwrite keeps it."
        )


def build(part: str, config: dict[str, Any]) -> nn.Module:
    """The part with shapes but without values."""
    with torch.device("meta"):
        if part in OURS:
            return OURS[part](**{key: value for key, value in config.items() if not key.startswith("_")})
        if part in DIFFUSERS:
            return DIFFUSERS[part].from_config(config)
        kind, settings = TRANSFORMERS[part]
        return kind(settings.from_dict(config))


def expected_shapes(part: str, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names in the part's file, and shapes."""
    return {current_name(part, name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def require_exact(
    part: str, model: nn.Module, weights: Weights, hint: str = "", named: Callable[[str], str] | None = None
) -> None:
    """Refuse weights whose names or shapes are not exactly the model's.

    Args:
        hint: what to do about it.
        named: a tensor's name in the source, if not that of released checkpoints.

    Raises:
        ConversionError: names the first few tensors that are missing, left over or of another shape.
    """
    expected, found = expected_shapes(part, model), weights.shapes
    quoted = partial(shown, part) if named is None else lambda name: f"'{named(name)}'"
    wrong = {
        "missing": [quoted(name) for name in expected if name not in found],
        "left over": [quoted(name) for name in found if name not in expected],
        "of another shape": [
            f"{quoted(name)} {list(found[name])} for {list(size)}"
            for name, size in expected.items()
            if found.get(name, size) != size
        ],
    }
    wrong = {kind: names for kind, names in wrong.items() if names}
    if wrong:
        said = "; ".join(f"{len(names)} {kind}, as {', '.join(names[:NAMED])}" for kind, names in wrong.items())
        raise ConversionError(f"{weights.origin}: the tensors of {part} do not fit its sizes: {said}.{hint}")


def shown(part: str, name: str) -> str:
    """A tensor by the name that it has in released checkpoints and in public CLIP files."""
    if part == "vision":
        return f"'{str(released_name('mllm', f'vision.clip.{name}')).removeprefix('img_model.')}'"
    return f"'{released_name(part, name) or name}'"


def write_part(folder: Path, model: Any, weights: Weights, dtype: torch.dtype | None) -> None:
    """config.json and weights, as the part's own save_pretrained writes them."""
    folder.mkdir(parents=True)
    if isinstance(model, ConfigMixin):
        model.save_config(str(folder))
        weights.save(folder / SAFETENSORS_WEIGHTS_NAME, dtype)
        return
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(dtype or next(iter(weights.dtypes.values()))).removeprefix("torch.")
    model.config.save_pretrained(folder)
    weights.save(folder / "model.safetensors", dtype)
