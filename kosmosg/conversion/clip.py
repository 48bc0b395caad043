"""The image tower of a public CLIP (`ViT-L-14`, a plain state dict) → a folder of transformers' CLIPVisionModel."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from kosmosg.conversion.atomic import written
from kosmosg.conversion.parts import build, require_exact, write_part
from kosmosg.conversion.plan import PlannedPart
from kosmosg.conversion.reader import read_data
from kosmosg.conversion.record import RECORD, describe, write_json
from kosmosg.conversion.sizes import Header, vision_sizes
from kosmosg.conversion.state import convert_public_vision
from kosmosg.conversion.weights import DTYPES, Weights


def convert_clip(path: Path, target: Path, dtype: str | None, heads: int | None) -> dict[str, Any]:
    """A public CLIP's image tower → a CLIPVisionModel folder, which `model.vision_weights` may name."""
    weights = Weights.of(path, partial(open_clip, path))
    header = Header("cfg", {})
    model = build("vision", vision_sizes(weights.shapes, header, heads))
    require_exact("vision", model, weights)
    part = PlannedPart(model, weights, "checkpoint")
    dropped = sorted(name for name in read_data(path) if not name.startswith("visual.") or name == "visual.proj")
    record = {**describe(path, "clip", header, {"vision": part}, dtype), "left_out": dropped}
    with written(target) as beside:
        write_part(beside, model, weights, DTYPES.get(str(dtype)))
        write_json(beside / RECORD, record)
    return record


def is_public_clip(path: Path) -> bool:
    data = read_data(path)
    return isinstance(data, Mapping) and "model" not in data and any(str(name).startswith("visual.") for name in data)


def open_clip(path: Path) -> dict[str, Tensor]:
    return convert_public_vision(read_data(path))
