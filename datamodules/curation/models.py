"""What the model stages share: loading from a folder or the Hub, the device, and greedy decoding."""

from typing import Any

import torch
from transformers import AutoImageProcessor
from transformers.utils.logging import disable_progress_bar

from datamodules.curation.stage_config import Model
from datamodules.errors import DataError

GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    # A model's own generation_config.json may set these; without sampling they would only be warned of.
    "temperature": None,
    "top_p": None,
    "top_k": None,
}


def find_device(device: str) -> torch.device:
    """`auto` is a GPU where there is one. Under Ray each worker sees its own alone."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def load_model(kind: Any, config: Model, device: torch.device) -> Any:
    """A transformers or diffusers model of class `kind`, frozen, in evaluation mode, on its device.

    Raises:
        DataError: there is no such model; the message names it.
    """
    disable_progress_bar()  # a bar for each worker would run through the curation's own
    model = load_part(kind, config, dtype=getattr(torch, config.dtype))
    return model.to(device).eval().requires_grad_(False)


def load_image_processor(config: Model) -> Any:
    """The model's image processor, of Pillow: the same pixels with and without torchvision. Raises DataError."""
    return load_part(AutoImageProcessor, config, backend="pil")


def load_part(kind: Any, config: Model, **options: Any) -> Any:
    """`kind.from_pretrained` with an error that names the key. Code that comes with a model is never run."""
    section = type(config).__name__.lower()
    try:
        return kind.from_pretrained(config.model, revision=config.revision, **options)
    except (OSError, ValueError) as error:
        raise DataError(f"{section}.model='{config.model}' cannot be loaded as {kind.__name__}: {error}") from error
