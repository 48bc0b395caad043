"""Experiments small enough for tests: every stage on a handful of samples, through the project's own shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from datamodules.sample import CaptionSample, ConstructedSample, EditSample, Entity, InterleavedSample, TextSample
from datamodules.shard_writer import ShardWriter
from tests import tiny

STAGES = ("language_modelling", "alignment", "instruction_tuning")
SAMPLES = 12
# Of the model's configuration, where an image decoder needs another than Stable Diffusion 1.5's.
KEYS = {"xl": [f"model.aligner.pooled_width={tiny.POOLED_WIDTH}"]}
CAPTIONS = ("a red fish", "a small dog", "a green bird", "a cat")  # the tiny CLIP tokenizer spends a token a letter


def picture(number: int) -> Image.Image:
    source = torch.Generator().manual_seed(number)
    pixels = torch.randint(256, (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3), generator=source)
    return Image.fromarray(pixels.byte().numpy())


def write_shards(folder: Path) -> Path:
    """train and val shards of every kind."""
    for split, first in (("train", 0), ("val", 100)):
        samples: dict[str, list] = {
            "text": [TextSample(f"A fish, {i}. It swims. The dog sleeps!", key=f"t{i}") for i in range(SAMPLES)],
            "captions": [
                CaptionSample(CAPTIONS[i % len(CAPTIONS)], picture(first + i), key=f"c{i}") for i in range(SAMPLES)
            ],
            "interleaved": [
                InterleavedSample(["Look. A dog.", picture(first + i), "It swims."], key=f"i{i}")
                for i in range(SAMPLES)
            ],
            "constructed": [
                ConstructedSample(
                    "a fish and a dog in the garden",
                    [Entity(word, picture(first + i), picture(first + i + 1)) for word in ("fish", "dog")],
                    picture(first + i + 2),
                    key=f"k{i}",
                )
                for i in range(SAMPLES)
            ],
            "edit": [
                EditSample("a fish", "make it night", picture(first + i), picture(first + i + 3), key=f"e{i}")
                for i in range(SAMPLES)
            ],
        }
        for kind, listed in samples.items():
            with ShardWriter(folder / kind, split, samples_per_shard=8) as writer:
                for sample in listed:
                    writer.write(sample)
    return folder


def write_config(
    folder: Path, shards: Path, tokenizer: Path, stable_diffusion: Path, init_from: Path
) -> dict[str, Path]:
    """One YAML for each stage, with runs under `folder`; stages 2 and 3 begin with a model folder."""
    mllm, aligner = tiny.mllm_sizes(), tiny.aligner_sizes()
    vision = mllm.pop("vision", None) or mllm.pop("vision_config")
    model = {
        "tokenizer": str(tokenizer),
        "image_size": tiny.IMAGE_SIZE,
        "mllm": {
            **mllm,
            "vision": {
                "image_size": vision["image_size"],
                "patch_size": vision["patch_size"],
                "width": vision["hidden_size"],
                "layers": vision["num_hidden_layers"],
                "heads": vision["num_attention_heads"],
                "ffn_width": vision["intermediate_size"],
            },
        },
        "aligner": {**aligner, "num_queries": tiny.QUERIES},
        "aligner_decoder": {name: value for name, value in aligner.items() if name != "width"},
        "image_decoder": str(stable_diffusion),
        "vision_weights": None,
    }

    def source(kind: str, weight: int = 1, held_out: bool = False) -> dict[str, Any]:
        validation = {"validation": str(shards / kind / "val-*.tar")} if held_out else {}
        return {"shards": str(shards / kind / "train-*.tar"), "weight": weight, **validation}

    data: dict[str, dict[str, Any]] = {
        "language_modelling": {
            "sequence_length": 48,
            "text": source("text", 5),
            "captions": source("captions", 5, held_out=True),
            "interleaved": source("interleaved", 2),
        },
        "alignment": {"max_clip_tokens": 22, "max_pieces": 60, "captions": source("captions", held_out=True)},
        "instruction_tuning": {
            "min_image_side": 0,
            "constructed": source("constructed", 2, held_out=True),
            "edit": source("edit", 2),
            "captions": source("captions", 1),
        },
    }
    files = {}
    for stage in STAGES:
        config = {
            "stage": stage,
            "run": str(folder / stage),
            "init_from": None if stage == "language_modelling" else str(init_from),
            "model": model,
            "data": {"micro_batch_size": 4, "validation_samples": 4, **data[stage]},
            "optimizer": {"lr": 1e-2, "warmup_steps": 1},
            "trainer": {
                "max_steps": 4,
                "val_every": 2,
                "checkpoint_every": 2,
                "log_every": 1,
                "accelerator": "cpu",
            },
            "wandb": {"mode": "disabled"},
        }
        if stage != "language_modelling":
            config["grids"] = {"every": 0}
        files[stage] = folder / f"{stage}.yaml"
        files[stage].write_text(yaml.safe_dump(config))
    return files


def losses(run: Path, names: Sequence[str] = ("train/loss",)) -> list[tuple[str, ...]]:
    """Rows (step, values) of metrics.csv, as written: equal text is equal bits."""
    import csv

    with open(run / "metrics.csv", newline="") as file:
        return [(row["step"], *(row[name] for name in names)) for row in csv.DictReader(file)]
