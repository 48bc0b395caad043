"""A model folder → one file in the layout of the released checkpoints, which the released code reads."""

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

# What a released checkpoint of each stage carries.
CARRIED = {
    "stage1": ("mllm",),
    "stage2": ("mllm", "aligner", "aligner_decoder", "text_encoder"),
    "final": ("mllm", "aligner", "unet", "vae"),
}


def export_checkpoint(folder: str | Path, file: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write `file` and return what it holds: stage, names by part, and the folder's parts that it does not carry.

    Args:
        folder: a model folder or a run folder that holds one.
        overwrite: replace `file`.

    Raises:
        FileNotFoundError: `folder` holds no model.
        ConversionError: a part whose weights are not those of its sizes, a model that the released code cannot
            compute, or `file` exists.
    """
    model, target = find_model(folder), Path(file)
    if target.is_dir():
        raise ConversionError(f"'{target}' is a folder; name the file to write, as kosmosg.pt.")
    require_free(target, overwrite)
    there = {part: model / part for part in WEIGHTS if (model / part / CONFIG_FILE).is_file()}
    stage = stage_of(there)
    parts = {part: exported(part, folder) for part, folder in there.items() if part in CARRIED[stage]}
    configs = {part: read_json(there[part] / CONFIG_FILE) for part in parts}
    require_computable(configs["mllm"])
    if (model / "tokenizer" / ADDED_FILE).is_file():
        raise ConversionError(f"'{model}' keeps grounding tokens, which the released code has no ids for.")
    state = released_state(parts, configs["mllm"])
    headers = released_headers(model, configs)
    with replaced(target) as temporary:
        torch.save({**headers, "model": state, **UNUSED}, temporary)
    return {
        "stage": stage,
        "parts": {part: len(weights.shapes) for part, weights in parts.items()},
        "left_out": sorted(set(there) - set(parts)),
    }


# Top-level names of fairseq's layout that inference has no use for.
UNUSED: dict[str, Any] = {
    "criterion": None,
    "optimizer_history": [],
    "task_state": {},
    "extra_state": {},
    "last_optimizer_state": None,
}


def exported(part: str, folder: Path) -> Weights:
    """A part's weights, checked against its configuration."""
    config = read_json(folder / CONFIG_FILE)
    expected = (OURS | DIFFUSERS).get(part)
    if expected is not None and (kind := config.get("_class_name", expected.__name__)) != expected.__name__:
        raise ConversionError(f"'{folder}' holds a {kind}, which released checkpoints have no place for.")
    if config.get("pooled_width") is not None:
        raise ConversionError(f"'{folder}' gives a pooled vector, which released checkpoints have no place for.")
    weights = required_weights(folder, part)
    require_exact(part, build(part, config), weights)
    return weights


def require_computable(mllm: Mapping[str, Any]) -> None:
    """Refuse what the released code would load and compute otherwise."""
    if mllm.get("xpos"):
        raise ConversionError("mllm: xpos=True is not exported: the released code never applies xPos.")
    activation = mllm["vision_config"].get("hidden_act")
    if activation != RELEASED_ACTIVATION:
        raise ConversionError(
            f"mllm: vision_config.hidden_act={activation!r} is not exported: the released image tower computes "
            f"{RELEASED_ACTIVATION!r}."
        )


def released_state(parts: Mapping[str, Weights], mllm: Mapping[str, Any]) -> dict[str, Tensor]:
    """`model` of a released checkpoint, mapped: the tied matrix under both names, and the two unused buffers."""
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
    """What the released code computes for xPos at construction and never reads (released-code.md, "Positions")."""
    return (torch.arange(0, head_width, 2) + XPOS_DECAY * head_width) / ((1 + XPOS_DECAY) * head_width)


def released_headers(model: Path, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """`args` and `cfg`: those of the checkpoint that the folder was converted from, else written from the sizes.

    Heads for which the released headers have no place stand in a section of ours, so that the way back needs no flags.
    """
    ours = {"vision_heads": configs["mllm"]["vision_config"]["num_attention_heads"]}
    ours |= {f"{p}_heads": configs[p]["heads"] for p in ("aligner", "aligner_decoder") if p in configs}
    record = model / RECORD
    kept = read_json(record).get("header") if record.is_file() else None
    if kept and kept["flavour"] == "args":
        return {"args": argparse.Namespace(**{**kept["values"], OUR_SECTION: ours}), "cfg": None}
    values = kept["values"] if kept and kept["values"] else written_header(configs)
    return {"args": None, "cfg": {**values, OUR_SECTION: ours}}


def written_header(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The settings from which the released code builds the model."""
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
