"""Names of the released checkpoints → ours. Strict: every name is mapped, known to be unneeded, or an error."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "out_proj"}
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
# Numbered layers: released prefix → (part, our prefix, names inside the layer). In the released code the *queries'*
# transformer is called M's encoder and the one over the states M's projection; in N likewise.
STACKS: dict[str, tuple[str, str, dict[str, str]]] = {
    "gpt_model.decoder.layers": ("mllm", "decoder.layers", LAYER),
    "img_model.visual.transformer.resblocks": ("mllm", "vision.clip.encoder.layers", BLOCK),
    "aligner.encoder_proj.layers": ("aligner", "encoder", LAYER),
    "aligner.encoder.layers": ("aligner", "decoder", LAYER),
    "aligner.decoder.layers": ("aligner_decoder", "decoder", LAYER),
    "aligner.decoder_proj.layers": ("aligner_decoder", "encoder", LAYER),
}
# Parts of Stable Diffusion that the released checkpoints carry along, in their libraries' own names.
THIRD_PARTY = {"aligner.clip_encoder.": "text_encoder", "diffusion_unet.unet.": "unet", "vae.vae.": "vae"}
TIED = ("gpt_model.decoder.output_projection.weight", "gpt_model.decoder.embed_tokens.weight")
UNNEEDED = (
    r"gpt_model\.decoder\.embed_positions\._float_tensor",  # a buffer whose content means nothing
    r"gpt_model\.decoder\.self_attn_sope\.scale",  # xPos is never applied
    r"gpt_model\.decoder\.output_projection\.weight",  # tied to the embedding, checked
    r"img_model\.visual\.proj",
    r"img_model\.visual\.transformer\.resblocks\.\d+\.attn\.(in_proj_(weight|bias)|out_proj\.(weight|bias))",
    r"aligner\.clip_encoder\.text_model\.embeddings\.position_ids",
)
NUMBERED = re.compile(r"^(?P<stack>.+?)\.(?P<number>\d+)\.(?P<name>.+)\.(?P<kind>weight|bias)$")


@dataclass
class Converted:
    """State dicts by part (mllm, aligner, aligner_decoder, text_encoder, unet, vae) and the names left out."""

    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    unneeded: list[str] = field(default_factory=list)

    def put(self, part: str, name: str, tensor: Tensor) -> None:
        self.parts.setdefault(part, {})[name] = tensor


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a released checkpoint; nothing but tensors, plain containers and argparse.Namespace is unpickled.

    Raises:
        pickle.UnpicklingError: the file holds anything else; torch names it.
        ValueError: not a checkpoint with a `model`.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), Mapping):
        raise ValueError(f"'{path}' is no released checkpoint: it has no 'model' mapping at its top.")
    return checkpoint


def convert_state(state: Mapping[str, Tensor]) -> Converted:
    """Rename the `model` of a released checkpoint.

    Raises:
        ValueError: a name that is neither mapped nor known to be unneeded, or an output matrix that is not the
            embedding.
    """
    converted, unknown = Converted(), []
    for name, tensor in state.items():
        place = our_name(name)
        if place is not None:
            converted.put(*place, tensor)
        elif any(re.fullmatch(pattern, name) for pattern in UNNEEDED):
            converted.unneeded.append(name)
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{len(unknown)} names of the checkpoint are not those of a released KOSMOS-G, as {sorted(unknown)[:5]}."
        )
    projection, embedding = TIED
    if projection in state and not torch.equal(state[projection], state.get(embedding, torch.empty(0))):
        raise ValueError(f"'{projection}' differs from '{embedding}', but the model ties them.")
    return converted


def our_name(name: str) -> tuple[str, str] | None:
    """The part and our name for a released name; None where there is none."""
    if name in NAMES:
        return NAMES[name]
    match = NUMBERED.match(name)
    if match and match["stack"] in STACKS:
        part, prefix, layer = STACKS[match["stack"]]
        if match["name"] in layer:
            return part, f"{prefix}.{match['number']}.{layer[match['name']]}.{match['kind']}"
    if not any(re.fullmatch(pattern, name) for pattern in UNNEEDED):
        for prefix, part in THIRD_PARTY.items():
            if name.startswith(prefix):
                return part, name.removeprefix(prefix)
    return None


def convert_public_vision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image tower of a public CLIP state dict (`visual.*`, fused q, k, v) → CLIPVisionModel's names.

    Names outside `visual.` and the projection belong to parts of CLIP that KOSMOS-G leaves out.

    Raises:
        ValueError: an unknown name under `visual.`.
    """
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith("visual.") or name == "visual.proj":
            continue
        fused = re.fullmatch(r"(.+)\.attn\.in_proj_(weight|bias)", name)
        if fused:
            for projection, rows in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                split[f"{fused[1]}.ts_attn.{projection}.{fused[2]}"] = rows
        else:
            split[name.replace(".attn.out_proj.", ".ts_attn.out_proj.")] = tensor
    converted = convert_state({f"img_model.{name}": tensor for name, tensor in split.items()})
    return {name.removeprefix("vision.clip."): tensor for name, tensor in converted.parts["mllm"].items()}
