"""Map tensor names of released checkpoints to those of kosmosg ("ours") and back.

Every released name is either mapped or known to be unneeded; otherwise conversion fails.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kosmosg.conversion.reader import ConversionError

ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
LAYER = {
    "self_attn_layer_norm": "self_attention_norm",
    "self_attn.inner_attn_ln": "self_attention.inner_norm",
    "encoder_attn_layer_norm": "cross_attention_norm",
    "final_layer_norm": "feed_forward_norm",
    "ffn.fc1": "feed_forward.fc1",
    "ffn.fc2": "feed_forward.fc2",
    "ffn.ffn_layernorm": "feed_forward.norm",
    **{f"self_attn.{name}": f"self_attention.{name}" for name in ATTENTION},
    **{f"encoder_attn.{name}": f"cross_attention.{name}" for name in ATTENTION},
}
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    **{f"ts_attn.{name}": f"self_attn.{name}" for name in ATTENTION},
}
VISUAL = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
# Whole names: released → (part, ours).
NAMES: dict[str, tuple[str, str]] = {
    "gpt_model.decoder.embed_tokens.weight": ("mllm", "decoder.embed_tokens.weight"),
    "gpt_model.decoder.layer_norm.weight": ("mllm", "decoder.norm.weight"),
    "gpt_model.decoder.layer_norm.bias": ("mllm", "decoder.norm.bias"),
    "img_connector.latent_query": ("mllm", "resampler.latents"),
    "img_connector.dense.weight": ("mllm", "resampler.projection.weight"),
    "img_connector.dense.bias": ("mllm", "resampler.projection.bias"),
    **{
        f"img_connector.x_attn.{name}.{kind}": ("mllm", f"resampler.attention.{name}.{kind}")
        for name in ATTENTION
        for kind in ("weight", "bias")
    },
    **{f"img_model.visual.{theirs}": ("mllm", f"vision.clip.{ours}") for theirs, ours in VISUAL.items()},
    "aligner.encoder_query": ("aligner", "queries"),
    "aligner.encoder_proj.embed_tokens.weight": ("aligner", "input_projection.weight"),
    "aligner.encoder_proj.embed_tokens.bias": ("aligner", "input_projection.bias"),
    "aligner.encoder_proj.embed_positions.weight": ("aligner", "positions.weight"),
    "aligner.encoder_proj.layer_norm.weight": ("aligner", "encoder_norm.weight"),
    "aligner.encoder_proj.layer_norm.bias": ("aligner", "encoder_norm.bias"),
    "aligner.encoder.layer_norm.weight": ("aligner", "decoder_norm.weight"),
    "aligner.encoder.layer_norm.bias": ("aligner", "decoder_norm.bias"),
    "aligner.decoder_query": ("aligner_decoder", "queries"),
    "aligner.decoder.layer_norm.weight": ("aligner_decoder", "decoder_norm.weight"),
    "aligner.decoder.layer_norm.bias": ("aligner_decoder", "decoder_norm.bias"),
    "aligner.decoder_proj.embed_positions.weight": ("aligner_decoder", "positions.weight"),
    "aligner.decoder_proj.layer_norm.weight": ("aligner_decoder", "encoder_norm.weight"),
    "aligner.decoder_proj.layer_norm.bias": ("aligner_decoder", "encoder_norm.bias"),
    "aligner.decoder_proj.output_projection.weight": ("aligner_decoder", "output_projection.weight"),
    "aligner.decoder_proj.output_projection.bias": ("aligner_decoder", "output_projection.bias"),
}
# Numbered layers: released prefix → (part, our prefix, names inside the layer). The released code calls the transformer
# of the queries in M "encoder" and that of the states "encoder_proj"; similarly in N.
STACKS: dict[str, tuple[str, str, dict[str, str]]] = {
    "gpt_model.decoder.layers": ("mllm", "decoder.layers", LAYER),
    "img_model.visual.transformer.resblocks": ("mllm", "vision.clip.encoder.layers", BLOCK),
    "aligner.encoder_proj.layers": ("aligner", "encoder", LAYER),
    "aligner.encoder.layers": ("aligner", "decoder", LAYER),
    "aligner.decoder.layers": ("aligner_decoder", "decoder", LAYER),
    "aligner.decoder_proj.layers": ("aligner_decoder", "encoder", LAYER),
}
# Parts of Stable Diffusion in released checkpoints; their tensors have the names of their libraries.
THIRD_PARTY = {"aligner.clip_encoder.": "text_encoder", "diffusion_unet.unet.": "unet", "vae.vae.": "vae"}
EMBEDDING = "gpt_model.decoder.embed_tokens.weight"
PROJECTION = "gpt_model.decoder.output_projection.weight"  # tied to the embedding
POSITIONS_BUFFER = "gpt_model.decoder.embed_positions._float_tensor"  # its content is arbitrary
XPOS_BUFFER = "gpt_model.decoder.self_attn_sope.scale"  # unused, because xPos is never applied
UNNEEDED = (
    re.escape(POSITIONS_BUFFER),
    re.escape(XPOS_BUFFER),
    re.escape(PROJECTION),  # `require_tied` checks that it equals the embedding
    r"img_model\.visual\.proj",
    r"img_model\.visual\.transformer\.resblocks\.\d+\.attn\.(in_proj_(weight|bias)|out_proj\.(weight|bias))",
    r"aligner\.clip_encoder\.text_model\.embeddings\.position_ids",
)
# Older diffusers' names of the VAE's attention layers, used in checkpoints and in files of Stable Diffusion.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_VAE_NAME = re.compile(rf"(.+\.attentions\.\d+)\.({'|'.join(OLD_ATTENTION)})\.(weight|bias)")
TEXT_PREFIX = "text_model."  # transformers 5 omits it in files of models that it built itself
COMPARED_ROWS = 4096  # rows of two matrices compared at a time
NUMBERED = re.compile(r"^(?P<stack>.+?)\.(?P<number>\d+)\.(?P<name>.+)\.(?P<kind>weight|bias)$")
RELEASED_NAMES = {place: name for name, place in NAMES.items()}
RELEASED_PREFIXES = {part: prefix for prefix, part in THIRD_PARTY.items()}


def our_name(name: str) -> tuple[str, str] | None:
    """Return the part and our name for a released name, or None."""
    if name in NAMES:
        return NAMES[name]
    match = NUMBERED.match(name)
    if match and match["stack"] in STACKS:
        part, prefix, layer = STACKS[match["stack"]]
        if match["name"] in layer:
            return part, f"{prefix}.{match['number']}.{layer[match['name']]}.{match['kind']}"
    if not is_unneeded(name):
        for prefix, part in THIRD_PARTY.items():
            if name.startswith(prefix):
                return part, current_name(part, name.removeprefix(prefix))
    return None


def released_name(part: str, name: str) -> str | None:
    """Return the released name for a part and our name; None if the released model has no such tensor."""
    if (part, name) in RELEASED_NAMES:
        return RELEASED_NAMES[part, name]
    for stack, (owner, prefix, layer) in STACKS.items():
        match = re.fullmatch(rf"{re.escape(prefix)}\.(\d+)\.(.+)\.(weight|bias)", name)
        theirs = {ours: theirs for theirs, ours in layer.items()}
        if owner == part and match and match[2] in theirs:
            return f"{stack}.{match[1]}.{theirs[match[2]]}.{match[3]}"
    return f"{RELEASED_PREFIXES[part]}{name}" if part in RELEASED_PREFIXES else None


def is_unneeded(name: str) -> bool:
    """Return whether a released name is known but unused."""
    return any(re.fullmatch(pattern, name) for pattern in UNNEEDED)


def current_name(part: str, name: str) -> str:
    """Return the current name of a tensor of Stable Diffusion, whose names depend on the library version."""
    if part == "text_encoder":
        return f"{TEXT_PREFIX}{name.removeprefix(TEXT_PREFIX)}"
    old = OLD_VAE_NAME.fullmatch(name) if part == "vae" else None
    return f"{old[1]}.{OLD_ATTENTION[old[2]]}.{old[3]}" if old else name


@dataclass
class Converted:
    """State dicts by part (mllm, aligner, aligner_decoder, text_encoder, unet, vae) and names of unneeded tensors."""

    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    unneeded: list[str] = field(default_factory=list)


def convert_state(state: Mapping[str, Tensor]) -> Converted:
    """Rename the tensors of a released checkpoint's `model` and check that its output matrix equals its embedding.

    Raises:
        ConversionError: a name is unknown, a tensor occurs under two names, or the output matrix is not the embedding.
    """
    converted = rename(state)
    require_tied(state)
    return converted


def rename(state: Mapping[str, Tensor]) -> Converted:
    """Rename as `convert_state`, without reading any tensor."""
    converted, unknown = Converted(), []
    for name, tensor in state.items():
        if (place := our_name(name)) is not None:
            part = converted.parts.setdefault(place[0], {})
            if place[1] in part:
                raise ConversionError(f"'{name}' is in the checkpoint twice, under an old and a current name.")
            part[place[1]] = tensor
        else:
            (converted.unneeded if is_unneeded(name) else unknown).append(name)
    if unknown:
        raise ConversionError(
            f"{len(unknown)} of the checkpoint's names are not those of KOSMOS-G, such as {sorted(unknown)[:5]}."
        )
    return converted


def require_tied(state: Mapping[str, Tensor]) -> None:
    """Raise a ConversionError if the output matrix is not the embedding."""
    if PROJECTION not in state:
        return
    projection, embedding = state[PROJECTION], state.get(EMBEDDING, torch.empty(0))
    shared = projection.data_ptr() == embedding.data_ptr()  # tied tensors are saved as one storage
    if projection.shape != embedding.shape or not (shared or equal(projection, embedding)):
        raise ConversionError(f"'{PROJECTION}' differs from '{EMBEDDING}', but the model ties them.")


def equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of the same shape are equal, comparing slices to save memory."""
    if not one.dim():
        return torch.equal(one, other)
    return all(torch.equal(a, b) for a, b in zip(one.split(COMPARED_ROWS), other.split(COMPARED_ROWS), strict=True))


def convert_public_vision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the vision encoder of OpenAI's CLIP (`visual.*`, fused q, k, v) to the names of CLIPVisionModel.

    Other tensors and the projection are not part of KOSMOS-G and are skipped.

    Raises:
        ConversionError: a name under `visual.` is unknown.
    """
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith("visual.") or name == "visual.proj":
            continue
        if fused := re.fullmatch(r"(.+)\.attn\.in_proj_(weight|bias)", name):
            for projection, rows in zip(ATTENTION[:3], tensor.chunk(3), strict=True):
                split[f"img_model.{fused[1]}.ts_attn.{projection}.{fused[2]}"] = rows
        else:
            split[f"img_model.{name.replace('.attn.out_proj.', '.ts_attn.out_proj.')}"] = tensor
    return {name.removeprefix("vision.clip."): t for name, t in rename(split).parts.get("mllm", {}).items()}
