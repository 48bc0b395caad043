"""Write a DreamBench, a COCO and encoders of a few kilobytes, in the published layouts."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from tests import tiny

SIDE = 64
PHOTOS = 3
OTHERS = 2
CAPTIONED = 12
JUDGED = ["kind: fish", "kind: dog", "colour: red", "colour: blue", "setting: in the snow", "setting: on the beach"]
FACTS = {
    "subjects": {
        "fish": {"class": "fish", "kind": "live", "kept_image": "01.png", "labels": {"kind": "fish", "colour": "blue"}},
        "dog": {"class": "dog", "kind": "live", "kept_image": "00.png", "labels": {"kind": "dog", "colour": "red"}},
        "boat": {"class": "boat", "kind": "object", "kept_image": "00.png"},
    },
    "prompts": {
        "live": {
            "original": ["a {} in the snow", "a {} wearing a hat", "a red {}"],
            "modified": ["{} in the snow", "{} wearing a hat", "{}, red"],
            "labels": [{"setting": "in the snow"}, {}, {"colour": "red"}],
        },
        "object": {
            "original": ["a {} in the snow", "a {} on the beach", "a red {}"],
            "modified": ["{} in the snow", "{} on the beach", "{}, red"],
            "labels": [{"setting": "in the snow"}, {"setting": "on the beach"}, {"colour": "red"}],
        },
    },
    "pairs": {
        "original": "a {} and a {} in the snow",
        "modified": "{} and {} in the snow",
        "subjects": [["fish", "dog"]],
    },
}


def picture(seed: int) -> Image.Image:
    """Return an image of coarse coloured blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def write_dreambench(folder: Path) -> Path:
    for number, subject in enumerate(FACTS["subjects"]):
        (folder / subject).mkdir(parents=True)
        for photo in range(PHOTOS):
            picture(10 * number + photo).save(folder / subject / f"{photo:02d}.png")
        (folder / subject / "others").mkdir()
        for other in range(OTHERS):
            picture(50 + 10 * number + other).save(folder / subject / "others" / f"{other:02d}.png")
    (folder / "dreambench.json").write_text(json.dumps(FACTS))
    return folder


def write_coco(folder: Path) -> Path:
    (folder / "val2014").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images, annotations = [], []
    for number in range(CAPTIONED):
        name = f"COCO_val2014_{number:012d}.png"
        picture(100 + number).save(folder / "val2014" / name)
        images.append({"id": number, "file_name": name})
        caption = tiny.SENTENCES[number % len(tiny.SENTENCES)]
        annotations.append({"id": 1000 + number, "image_id": number, "caption": caption})
    content = {"images": images, "annotations": annotations}
    (folder / "annotations" / "captions_val2014.json").write_text(json.dumps(content))
    return folder


def write_encoders(folder: Path, side: int = SIDE) -> Path:
    """Write clip/, dino/, fid/ and judge/ with random weights; CLIP and DINO read images of `side` pixels."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        tokenizer = tiny.clip_tokenizer()
        text = {
            **sizes,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": tiny.QUERIES,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        vision = {**sizes, "image_size": side, "patch_size": 16}
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
        dino = ViTModel(ViTConfig(**sizes, image_size=side, patch_size=16), add_pooling_layer=False)
        resnet = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
        fid = ResNetForImageClassification(ResNetConfig(**resnet, num_labels=3))
        judge = ResNetForImageClassification(ResNetConfig(**resnet, id2label=dict(enumerate(JUDGED))))
        clip.save_pretrained(folder / "clip")
        dino.save_pretrained(folder / "dino")
        fid.save_pretrained(folder / "fid")
        judge.save_pretrained(folder / "judge")
    tokenizer.save_pretrained(folder / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side).save_pretrained(folder / "clip")
    for name in ("dino", "fid", "judge"):
        ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder / name)
    return folder
