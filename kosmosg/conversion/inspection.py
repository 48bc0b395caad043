"""What a model folder, a run folder or a released checkpoint holds. No weights are read: shapes stand in headers."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kosmosg.config import RUN_CONFIG
from kosmosg.conversion.checkpoint import STAGES, Checkpoint, stage_of
from kosmosg.conversion.parts import DIFFUSERS, PIPELINE, RECORD, TRANSFORMERS, WEIGHTS
from kosmosg.conversion.reader import read_json
from kosmosg.conversion.weights import Weights, required_weights
from kosmosg.models.storage import CONFIG_FILE, find_model
from kosmosg.tokenizer import Tokenizer

HEADER_SIZES = ("decoder_embed_dim", "decoder_layers", "decoder_ffn_embed_dim", "decoder_attention_heads",
                "latent_query_num", "dropout")  # fmt: skip


def inspect_model(path: str | Path) -> dict[str, Any]:
    """Plain values: kind, stage, parts, what a pipeline lacks, sizes, parameters, dtype, vocabulary, provenance.

    Raises:
        FileNotFoundError: nothing there, or a folder without a model.
        ConversionError: a damaged or foreign file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"'{path}' does not exist.")
    return inspect_folder(path) if path.is_dir() else inspect_checkpoint(path)


def inspect_folder(path: Path) -> dict[str, Any]:
    """A model folder, or a run folder whose model is in model/."""
    model = find_model(path)
    found = (part for part in WEIGHTS if (model / part / CONFIG_FILE).is_file())
    weights = {part: required_weights(model / part, part) for part in found}
    there = {*weights, *(part for part in ("tokenizer", "scheduler") if (model / part).is_dir())}
    configs = {part: read_json(model / part / CONFIG_FILE) for part in weights}
    sizes = {part: {k: v for k, v in config.items() if not k.startswith("_")} for part, config in configs.items()}
    vocabulary = len(Tokenizer.from_pretrained(model / "tokenizer")) if "tokenizer" in there else None
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
        **described(weights, there),
        "sizes": sizes,
        "vocabulary": vocabulary,
        "provenance": provenance,
    }


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """A released checkpoint."""
    source = Checkpoint.read(path)
    header = {key: source.header.get(key) for key in HEADER_SIZES}
    embedding = source.parts["mllm"].shapes.get("decoder.embed_tokens.weight") if "mllm" in source.parts else None
    return {
        "path": str(path),
        "kind": "released checkpoint",
        **described(source.parts, set(source.parts)),
        "sizes": {"header": header},
        "vocabulary": embedding[0] if embedding else None,
        "provenance": {"header": source.header.flavour, "names left out": source.left_out},
    }


def described(weights: Mapping[str, Weights], there: set[str]) -> dict[str, Any]:
    """What folders and checkpoints have in common."""
    dtypes = Counter(part.dtype for part in weights.values())
    return {
        "stage": STAGES[stage_of(weights)],
        "parts": {
            part: {"tensors": len(found.shapes), "parameters": found.parameters, "dtype": found.dtype}
            for part, found in weights.items()
        },
        "missing for the pipeline": [part for part in PIPELINE if part not in there],
        "parameters": sum(found.parameters for found in weights.values()),
        "dtype": ", ".join(dtypes),
    }


def inspection_text(found: Mapping[str, Any]) -> str:
    """The lines that `kosmosg inspect` prints."""
    lines = [f"{found['path']}: {found['kind']}, {found['stage']}"]
    for name, part in found["parts"].items():
        lines.append(f"  {name:<16}{part['tensors']:>6,} tensors {part['parameters']:>15,} parameters  {part['dtype']}")
    lines.append(f"  {'in all':<16}{'':>15}{found['parameters']:>15,} parameters")
    missing = found["missing for the pipeline"]
    lines.append(f"missing for the pipeline: {', '.join(missing) or 'nothing'}")
    lines.append(f"vocabulary: {found['vocabulary']}")
    for part, sizes in found["sizes"].items():
        if part in DIFFUSERS or part in TRANSFORMERS:
            continue  # long, and known from the Stable Diffusion; --json tells them
        told = ((key, value) for key, value in sizes.items() if value is not None)
        lines.append(f"{part}: " + ", ".join(f"{key}={value}" for key, value in told))
    lines += [f"{key}: {value}" for key, value in found["provenance"].items()]
    return "\n".join(lines)
