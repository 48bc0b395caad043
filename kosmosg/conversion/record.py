"""Describe conversions (conversion.json, model card, terminal) and models (`kosmosg inspect`).

No weights are read; shapes come from file headers.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kosmosg.config import RUN_CONFIG
from kosmosg.conversion.checkpoint import STAGES, Checkpoint, Header, stage_of
from kosmosg.conversion.parts import OURS, PIPELINE, RECORD, WEIGHTS
from kosmosg.conversion.reader import read_json
from kosmosg.conversion.weights import Weights, required_weights
from kosmosg.models.build import IMAGE_DECODERS, image_decoder_class
from kosmosg.models.kosmosg import load_tokenizer
from kosmosg.models.published import CONFIGS, STABLE_DIFFUSION_1_5
from kosmosg.models.storage import CONFIG_FILE, find_model
from kosmosg.models.vision_language_model import NETWORK, VisionLanguageModel
from kosmosg.pipeline import MODEL_INDEX, decoder_of_run
from kosmosg.tokenizer import Tokenizer

HEADER_SIZES = ("decoder_embed_dim", "decoder_layers", "decoder_ffn_embed_dim", "decoder_attention_heads",
                "latent_query_num", "dropout")  # fmt: skip
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

Prompts of interleaved images and text for a frozen Stable Diffusion ([arXiv 2310.02992](https://arxiv.org/abs/2310.02992)).

Converted from `{file}` ({bytes:,} bytes, SHA-256 `{sha256}`) by `kosmosg convert`, which renamed tensors and
{cast}. `{record}` lists all decisions and omitted tensors.

| part | parameters | type | from |
|---|---:|---|---|
{parts}

```python
{use}
```

The licence of these weights is that of {origin}{decoder}; the conversion adds no terms of its own.
"""


@dataclass(frozen=True)
class PlannedPart:
    """A part to write: the module on the meta device, matching weights, and their source."""

    model: Any
    weights: Weights
    source: str


def model_card(record: Mapping[str, Any]) -> str:
    """Return the model card of a model folder."""
    decoder = record["decoder"]
    taken = any(part["from"] == "decoder" for part in record["parts"].values())
    base = decoder and (STABLE_DIFFUSION_1_5 if decoder["name"] == PUBLISHED else decoder["name"])
    dtype = record["dtype"]
    return CARD.format(
        base=f"base_model: {base}\n" if base and not Path(base).is_dir() else "",
        stage=STAGES[record["kind"]],
        cast="changed no value" if dtype is None else f"rounded values to {dtype}",
        record=RECORD,
        parts="\n".join(
            f"| {name} | {part['parameters']:,} | {part['dtype']} | {part['from']} |"
            for name, part in record["parts"].items()
        ),
        use=USE[record["pipeline"]],
        origin=record.get("origin", "the released checkpoint"),
        decoder=f", and that of {decoder['name']} for what was taken from it" if taken else "",
        **record["source"],
    )


def summary(record: Mapping[str, Any]) -> str:
    """Return the output of `kosmosg convert`."""
    source, kind = record["source"], STAGES.get(record["kind"], "vision encoder of CLIP")
    lines = [f"{source['file']}: {kind}, sha256 {source['sha256']}", *part_lines(record["parts"])]
    lines += [f"{key}: {value}" for key, value in record["decided"].items()]
    for name, value in (record.get("decoder") or {}).items():
        lines.append(f"decoder: {value}" if name == "name" else f"decoder's {name}: {value}")
    lines.append(f"left out: {', '.join(record['left_out']) or 'nothing'}")
    if record.get("pipeline") is False:
        lines.append("no pipeline yet: it needs AlignerNet, a U-Net and a VAE (stage 2 or final, and --decoder).")
    return "\n".join(lines)


def part_lines(parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line per part, and one for the total."""
    lines = []
    for name, part in parts.items():
        origin = f", from the {part['from']}" if "from" in part else ""
        counts = f"{part['tensors']:>6,} tensors {part['parameters']:>15,} parameters"
        lines.append(f"  {name:<16}{counts}  {part['dtype']}{origin}")
    total = sum(part["parameters"] for part in parts.values())
    return [*lines, f"  {'total':<16}{'':>15}{total:>15,} parameters"]


def describe(
    files: Sequence[Path], kind: str, header: Header, parts: Mapping[str, PlannedPart], dtype: str | None
) -> dict[str, Any]:
    """Return what every conversion records; the hash is that of the concatenated files."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    names, size = ", ".join(path.name for path in files), sum(path.stat().st_size for path in files)
    return {
        "source": {"file": names, "bytes": size, "sha256": digest.hexdigest()},
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


def inspect_model(path: str | Path) -> dict[str, Any]:
    """Describe a model: kind, stage, parts, missing parts, sizes, parameters, dtype, vocabulary, provenance.

    Raises:
        FileNotFoundError: the path does not exist, or is a folder without a model.
        ConversionError: the file is damaged or not a released checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"'{path}' does not exist.")
    return inspect_folder(path) if path.is_dir() else inspect_checkpoint(path)


def inspect_folder(path: Path) -> dict[str, Any]:
    """Describe a model folder, or the model of a run folder."""
    model = find_model(path)
    needed = needed_parts(model, path)
    # A processor in tokenizer/ also has a configuration file.
    parts = [part for part in dict.fromkeys((*WEIGHTS, *needed)) if part != "tokenizer"]
    networks = (part for part in parts if (model / part / CONFIG_FILE).is_file())
    configs = {part: read_json(model / part / CONFIG_FILE) for part in networks}
    existing = {*configs, *(part for part in ("tokenizer", "scheduler") if (model / part).is_dir())}
    weights = {}
    for part, config in configs.items():
        folder = model / part
        if config.get("_class_name") == VisionLanguageModel.__name__:
            folder /= NETWORK
            if not folder.is_dir():  # frozen weights are not copied; the configuration names their source
                continue
        weights[part] = required_weights(folder, part)
    sizes = {part: {k: v for k, v in config.items() if not k.startswith("_")} for part, config in configs.items()}
    vocabulary = None
    if "tokenizer" in existing:
        tokenizer = load_tokenizer(model / "tokenizer")
        vocabulary = len(tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.processor.tokenizer)
    provenance: dict[str, Any] = {}
    if (model / RECORD).is_file():
        record = read_json(model / RECORD)
        provenance = {"converted from": record["source"], "decoder": record["decoder"]}
    if model != path and (path / RUN_CONFIG).is_file():
        run = yaml.safe_load((path / RUN_CONFIG).read_text(encoding="utf-8"))
        provenance = {"run": str(path), "stage": run.get("stage"), "seed": run.get("seed")}
    return {
        "path": str(path),
        "kind": "run folder" if model != path else "model folder",
        **describe_parts(weights, existing, needed),
        "sizes": sizes,
        "vocabulary": vocabulary,
        "provenance": provenance,
    }


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """Describe a released checkpoint."""
    source = Checkpoint.read(path)
    header = {key: source.header.get(key) for key in HEADER_SIZES}
    embedding = source.parts["mllm"].shapes.get("decoder.embed_tokens.weight") if "mllm" in source.parts else None
    return {
        "path": str(path),
        "kind": "released checkpoint",
        **describe_parts(source.parts, set(source.parts), PIPELINE),
        "sizes": {"header": header},
        "vocabulary": embedding[0] if embedding else None,
        "provenance": {"header": source.header.flavour, "names left out": source.left_out},
    }


def needed_parts(model: Path, path: Path) -> Sequence[str]:
    """Return the parts of the model's pipeline, by default those for Stable Diffusion."""
    index = read_json(model / MODEL_INDEX) if (model / MODEL_INDEX).is_file() else {}
    decoder = decoder_of_run(path)
    kind = IMAGE_DECODERS.get(index.get("family", ""))
    if kind is None and decoder is not None and (Path(decoder).is_dir() or decoder in CONFIGS):
        kind = image_decoder_class(decoder)
    return PIPELINE if kind is None else ("mllm", "aligner", "tokenizer", *kind.networks, "scheduler")


def describe_parts(weights: Mapping[str, Weights], existing: set[str], needed: Sequence[str]) -> dict[str, Any]:
    """Return the entries that folders and checkpoints have in common."""
    dtypes = Counter(part.dtype for part in weights.values())
    return {
        "stage": STAGES[stage_of(weights)],
        "parts": {
            name: {"tensors": len(part.shapes), "parameters": part.parameters, "dtype": part.dtype}
            for name, part in weights.items()
        },
        "missing for the pipeline": [part for part in needed if part not in existing],
        "parameters": sum(part.parameters for part in weights.values()),
        "dtype": ", ".join(dtypes),
    }


def inspection_text(content: Mapping[str, Any]) -> str:
    """Return the output of `kosmosg inspect`."""
    lines = [f"{content['path']}: {content['kind']}, {content['stage']}", *part_lines(content["parts"])]
    missing = content["missing for the pipeline"]
    lines.append(f"missing for the pipeline: {', '.join(missing) or 'nothing'}")
    lines.append(f"vocabulary: {content['vocabulary']}")
    for part, sizes in content["sizes"].items():
        if part not in OURS and part != "header":
            continue  # the image decoder's configurations are long; --json prints them
        lines.append(f"{part}: " + ", ".join(f"{key}={value}" for key, value in sizes.items() if value is not None))
    lines += [f"{key}: {value}" for key, value in content["provenance"].items()]
    return "\n".join(lines)
