"""Export a model folder to a checkpoint file that the released code can load."""

import argparse
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kosmosg.conversion.checkpoint import OUR_SECTION, RELEASED_ACTIVATION, stage_of
from kosmosg.conversion.names import EMBEDDING, POSITIONS_BUFFER, PROJECTION, XPOS_BUFFER, released_name
from kosmosg.conversion.parts import DIFFUSERS, OURS, RECORD, WEIGHTS, build, require_exact, require_free
from kosmosg.conversion.reader import ConversionError, read_json
from kosmosg.conversion.weights import Weights, required_weights
from kosmosg.files import replaced
from kosmosg.models.mllm import MAX_TOKENS
from kosmosg.models.positions import XPOS_DECAY
from kosmosg.models.storage import CONFIG_FILE, find_model
from kosmosg.tokenizer import ADDED_FILE

# Parts of a released checkpoint by stage.
STAGE_PARTS = {
    "stage1": ("mllm",),
    "stage2": ("mllm", "aligner", "aligner_decoder", "text_encoder"),
    "final": ("mllm", "aligner", "unet", "vae"),
}


def export_checkpoint(folder: str | Path, file: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write a released checkpoint.

    Args:
        folder: model folder or run folder.
        overwrite: replace `file`.

    Returns:
        `stage`; `parts`, the number of tensors by part; `left_out`, parts of the folder that are not in the file.

    Raises:
        FileNotFoundError: `folder` holds no model.
        ConversionError: weights do not fit the configuration, the released code cannot compute the model, or `file`
            exists.
    """
    model, target = find_model(folder), Path(file)
    if target.is_dir():
        raise ConversionError(f"'{target}' is a folder; name the file to write, such as kosmosg.pt.")
    require_free(target, overwrite)
    folders = {part: model / part for part in WEIGHTS if (model / part / CONFIG_FILE).is_file()}
    stage = stage_of(folders)
    parts = {part: checked_weights(part, path) for part, path in folders.items() if part in STAGE_PARTS[stage]}
    configs = {part: read_json(folders[part] / CONFIG_FILE) for part in parts}
    require_computable(configs["mllm"])
    if (model / "tokenizer" / ADDED_FILE).is_file():
        raise ConversionError(f"'{model}' has grounding tokens, for which the released code has no ids.")
    state = released_state(parts, configs["mllm"])
    headers = released_headers(model, configs)
    with replaced(target) as temporary:
        torch.save({**headers, "model": state, **UNUSED}, temporary)
    return {
        "stage": stage,
        "parts": {part: len(weights.shapes) for part, weights in parts.items()},
        "left_out": sorted(set(folders) - set(parts)),
    }


# Top-level keys of fairseq's layout that inference does not use.
UNUSED: dict[str, Any] = {
    "criterion": None,
    "optimizer_history": [],
    "task_state": {},
    "extra_state": {},
    "last_optimizer_state": None,
}


def checked_weights(part: str, folder: Path) -> Weights:
    """Return the weights of a part, checked against its configuration."""
    config = read_json(folder / CONFIG_FILE)
    expected = (OURS | DIFFUSERS).get(part)
    if expected is not None and (kind := config.get("_class_name", expected.__name__)) != expected.__name__:
        raise ConversionError(f"'{folder}' holds a {kind}, which released checkpoints have no place for.")
    if config.get("pooled_width") is not None:
        raise ConversionError(f"'{folder}' has a pooled vector, which released checkpoints have no place for.")
    weights = required_weights(folder, part)
    require_exact(part, build(part, config), weights)
    return weights


def require_computable(mllm: Mapping[str, Any]) -> None:
    """Raise a ConversionError for settings that the released code would load but compute differently."""
    if mllm.get("xpos"):
        raise ConversionError("mllm: xpos=True is not exported: the released code never applies xPos.")
    activation = mllm["vision_config"].get("hidden_act")
    if activation != RELEASED_ACTIVATION:
        raise ConversionError(
            f"mllm: vision_config.hidden_act={activation!r} is not exported: the released vision encoder computes "
            f"{RELEASED_ACTIVATION!r}."
        )


def released_state(parts: Mapping[str, Weights], mllm: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state dict of a released checkpoint, with the tied matrix under both names and two unused buffers."""
    state: dict[str, Tensor] = OrderedDict()
    for part, weights in parts.items():
        for name, tensor in weights.open().items():
            state[str(released_name(part, name))] = tensor
    embedding = state[EMBEDDING]
    state[PROJECTION] = embedding
    state[POSITIONS_BUFFER] = torch.zeros(1, dtype=embedding.dtype)
    state[XPOS_BUFFER] = xpos_scale(mllm["width"] // mllm["heads"]).to(embedding.dtype)
    return state


def xpos_scale(head_width: int) -> Tensor:
    """Return the xPos buffer that the released code computes but never reads (released-code.md, "Positions")."""
    return (torch.arange(0, head_width, 2) + XPOS_DECAY * head_width) / ((1 + XPOS_DECAY) * head_width)


def released_headers(model: Path, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the headers `args` and `cfg`, those of the converted checkpoint or else built from the sizes.

    Heads that released headers do not contain go to `OUR_SECTION`, so that converting back needs no flags.
    """
    heads = {"vision_heads": configs["mllm"]["vision_config"]["num_attention_heads"]}
    heads |= {f"{p}_heads": configs[p]["heads"] for p in ("aligner", "aligner_decoder") if p in configs}
    record = model / RECORD
    header = read_json(record).get("header") if record.is_file() else None
    if header and header["flavour"] == "args":
        return {"args": argparse.Namespace(**{**header["values"], OUR_SECTION: heads}), "cfg": None}
    values = header["values"] if header and header["values"] else build_header(configs)
    return {"args": None, "cfg": {**values, OUR_SECTION: heads}}


def build_header(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings from which the released code builds the model."""
    mllm = configs["mllm"]
    model = {
        "_name": "kosmosg_xl",
        "decoder_embed_dim": mllm["width"],
        "decoder_input_dim": mllm["width"],
        "decoder_output_dim": mllm["width"],
        "decoder_ffn_embed_dim": mllm["ffn_width"],
        "decoder_layers": mllm["layers"],
        "decoder_attention_heads": mllm["heads"],
        "dropout": mllm["dropout"],
        "attention_dropout": mllm["dropout"],
        "activation_dropout": 0.0,
        "activation_fn": "gelu",
        "decoder_normalize_before": True,
        "decoder_learned_pos": False,
        "share_decoder_input_output_embed": True,
        "subln": True,
        "sope_rel_pos": True,
        "no_scale_embedding": False,
        "flash_attention": True,
        "image_encoder": "clip",
        "visual_model_name": "ViT-L-14",
        "visual_output_dim": mllm["vision_config"]["hidden_size"],
        "connector": "xconnector",
        "latent_query_num": mllm["image_tokens"],
        "align": "aligner_decoder" in configs,
        "max_target_positions": MAX_TOKENS,
        "tokens_per_sample": MAX_TOKENS,
    }
    task = {"_name": "kosmosg", "tokens_per_sample": MAX_TOKENS, "image_token_length": mllm["image_tokens"]}
    return {"_name": None, "model": model, "task": {**task, "align": model["align"]}}
