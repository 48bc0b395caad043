"""What a conversion did: conversion.json, the model card, and a few lines for the terminal."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kosmosg.conversion.checkpoint import STAGES, Header
from kosmosg.conversion.parts import RECORD
from kosmosg.conversion.stable_diffusion_v1_5 import HUB_ID
from kosmosg.conversion.weights import Weights

PUBLISHED = "published configurations of Stable Diffusion v1.5"
USE = {
    True: """import torch
from kosmosg.pipeline import KosmosGPipeline

pipe = KosmosGPipeline.from_pretrained("path/to/this/folder", torch_dtype=torch.float16).to("cuda")
pipe("<i> in the snow", images=[picture]).images""",
    False: """from pathlib import Path
from kosmosg.models.mllm import MLLM
from kosmosg.models.storage import load_part

mllm = load_part(MLLM, Path("path/to/this/folder/mllm"))  # or init_from= of the next training stage""",
}
CARD = """---
library_name: diffusers
pipeline_tag: image-to-image
tags:
- kosmos-g
- subject-driven-generation
- text-to-image
{base}---

# KOSMOS-G, {stage}

Interleaved images and text as the prompt of a frozen Stable Diffusion ([arXiv 2310.02992](https://arxiv.org/abs/2310.02992)).

Converted from `{file}` ({bytes:,} bytes, SHA-256 `{sha256}`) by `kosmosg convert`, which changed names and
{cast}. What was decided and left out is in `{record}`.

| part | parameters | type | from |
|---|---:|---|---|
{parts}

```python
{use}
```

The licence of these weights is that of the released checkpoint{decoder}; the conversion adds no terms of its own.
"""


@dataclass(frozen=True)
class PlannedPart:
    """A part that fits: the module without values, the weights, and where they come from."""

    model: Any
    weights: Weights
    source: str


def model_card(record: Mapping[str, Any]) -> str:
    """README.md of the folder."""
    decoder = record["decoder"]
    taken = any(part["from"] == "decoder" for part in record["parts"].values())
    base = decoder and (HUB_ID if decoder["name"] == PUBLISHED else decoder["name"])
    dtype = record["dtype"]
    return CARD.format(
        base=f"base_model: {base}\n" if base and not Path(base).is_dir() else "",
        stage=STAGES[record["kind"]],
        cast="no value" if dtype is None else f"rounded values to {dtype}",
        record=RECORD,
        parts="\n".join(
            f"| {name} | {part['parameters']:,} | {part['dtype']} | {part['from']} |"
            for name, part in record["parts"].items()
        ),
        use=USE[record["pipeline"]],
        decoder=f", and that of {decoder['name']} for what was taken from it" if taken else "",
        **record["source"],
    )


def summary(record: Mapping[str, Any]) -> str:
    """The lines that `kosmosg convert` prints."""
    source, total = record["source"], sum(part["parameters"] for part in record["parts"].values())
    lines = [
        f"{source['file']}: {STAGES.get(record['kind'], 'image tower of a public CLIP')}, sha256 {source['sha256']}"
    ]
    for name, part in record["parts"].items():
        counts = f"{part['tensors']:>6,} tensors {part['parameters']:>15,} parameters"
        lines.append(f"  {name:<16}{counts}  {part['dtype']}, from the {part['from']}")
    lines.append(f"  {'in all':<16}{'':>15}{total:>15,} parameters")
    lines += [f"{key}: {value}" for key, value in record["decided"].items()]
    for name, value in (record.get("decoder") or {}).items():
        lines.append(f"decoder: {value}" if name == "name" else f"decoder's {name}: {value}")
    lines.append(f"left out: {', '.join(record['left_out']) or 'nothing'}")
    if record.get("pipeline") is False:
        lines.append("no pipeline yet: it needs AlignerNet, a U-Net and a VAE (stage 2 or final, and --decoder).")
    return "\n".join(lines)


def describe(
    path: Path, kind: str, header: Header, parts: Mapping[str, PlannedPart], dtype: str | None
) -> dict[str, Any]:
    """What every conversion records."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "source": {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256},
        "kind": kind,
        "dtype": dtype,
        "parts": {
            name: {
                "tensors": len(part.weights.shapes),
                "parameters": part.weights.parameters,
                "dtype": dtype or part.weights.dtype,
                "from": part.source,
            }
            for name, part in parts.items()
        },
        "decided": header.decided,
    }
