"""State dicts renamed: the `model` of a released checkpoint, and the image tower of a public CLIP."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kosmosg.conversion.errors import ConversionError
from kosmosg.conversion.names import EMBEDDING, PROJECTION, is_unneeded, our_name

COMPARED_ROWS = 4096  # of two matrices at a time, which keeps the comparison's own memory small


@dataclass
class Converted:
    """State dicts by part (mllm, aligner, aligner_decoder, text_encoder, unet, vae) and the names left out."""

    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    unneeded: list[str] = field(default_factory=list)

    def put(self, part: str, name: str, tensor: Tensor) -> None:
        self.parts.setdefault(part, {})[name] = tensor


def convert_state(state: Mapping[str, Tensor]) -> Converted:
    """Rename the `model` of a released checkpoint and check that its output matrix is its embedding.

    Raises:
        ConversionError: a name that is neither mapped nor known to be unneeded, two names for one tensor, or an
            output matrix that is not the embedding.
    """
    converted = rename(state)
    require_tied(state)
    return converted


def rename(state: Mapping[str, Tensor]) -> Converted:
    """`convert_state` without reading any tensor."""
    converted, unknown = Converted(), []
    for name, tensor in state.items():
        place = our_name(name)
        if place is not None:
            if place[1] in converted.parts.get(place[0], {}):
                raise ConversionError(f"'{name}' is in the checkpoint twice, under an old name and today's.")
            converted.put(*place, tensor)
        elif is_unneeded(name):
            converted.unneeded.append(name)
        else:
            unknown.append(name)
    if unknown:
        raise ConversionError(
            f"{len(unknown)} names of the checkpoint are not those of a released KOSMOS-G, as {sorted(unknown)[:5]}."
        )
    return converted


def require_tied(state: Mapping[str, Tensor]) -> None:
    """Refuse an output matrix other than the embedding.

    Raises:
        ConversionError: they differ.
    """
    if PROJECTION not in state:
        return
    projection, embedding = state[PROJECTION], state.get(EMBEDDING, torch.empty(0))
    one = projection.data_ptr() == embedding.data_ptr()  # a tied pair is saved as one storage
    if projection.shape != embedding.shape or not (one or equal(projection, embedding)):
        raise ConversionError(f"'{PROJECTION}' differs from '{EMBEDDING}', but the model ties them.")


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape hold the same values; compared in slices."""
    if not one.dim():
        return torch.equal(one, other)
    pairs = zip(one.split(COMPARED_ROWS), other.split(COMPARED_ROWS), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def convert_public_vision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image tower of a public CLIP state dict (`visual.*`, fused q, k, v) → CLIPVisionModel's names.

    Names outside `visual.` and the projection belong to parts of CLIP that KOSMOS-G leaves out.

    Raises:
        ConversionError: an unknown name under `visual.`.
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
    converted = rename({f"img_model.{name}": tensor for name, tensor in split.items()})
    return {name.removeprefix("vision.clip."): tensor for name, tensor in converted.parts.get("mllm", {}).items()}
