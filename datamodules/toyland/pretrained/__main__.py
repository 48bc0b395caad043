"""Train the missing tiny pretrained models: python -m datamodules.toyland.pretrained [key=value …]

They are written to datamodules/toyland/weights/, or to output=….
"""

import hashlib
import json
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported

import shutil
import signal
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTextModel, CLIPTokenizer, ViTImageProcessorPil

from datamodules.toyland.pretrained import encoders, stable_diffusion
from datamodules.toyland.pretrained.data import (
    draw_pairs,
    draw_pool,
    sentences,
    train_clip_tokenizer,
    train_prompt_tokenizer,
)
from datamodules.toyland.scene import SIZE
from kosmosg.config import load_config

WEIGHTS = Path(__file__).parents[1] / "weights"


@dataclass
class Schedule:
    """Training of one model."""

    steps: int
    """Optimizer steps."""
    batch_size: int
    """Images (for dino: pairs of images) per step."""
    lr: float
    """Peak learning rate."""


@dataclass
class Recipe:
    """Configuration of the training."""

    output: str = str(WEIGHTS)
    """Folder of the models. Existing models are not trained again."""
    work: str = "data/toyland/pretrained"
    """Folder of cached images and checkpoints."""
    only: list[str] = field(default_factory=lambda: ["tokenizer", "vae", "clip", "dino", "judge", "unet"])
    """Models to train; unet needs vae and clip."""
    pictures: int = 40_000
    """Number of scenes in the pool."""
    pairs: int = 8_000
    """Number of subjects drawn twice, for dino and judge."""
    told: float = 0.8
    """Share of captions that describe looks. Without them, the U-Net would not learn to respond to looks."""
    vocabulary: int = 460
    """Maximum vocabulary size of both tokenizers."""
    threads: int = 0
    """Number of CPU threads; 0: all cores."""
    seed: int = 0
    vae: Schedule = field(default_factory=lambda: Schedule(steps=5000, batch_size=16, lr=3e-3))
    decoder: Schedule = field(default_factory=lambda: Schedule(steps=4000, batch_size=16, lr=2e-3))
    """Second phase of the VAE: the decoder alone."""
    clip: Schedule = field(default_factory=lambda: Schedule(steps=8000, batch_size=64, lr=1e-3))
    clip_patterns: Schedule = field(default_factory=lambda: Schedule(steps=5500, batch_size=64, lr=5e-4))
    """Second phase of CLIP: discrimination of patterns."""
    dino: Schedule = field(default_factory=lambda: Schedule(steps=500, batch_size=96, lr=1e-3))
    judge: Schedule = field(default_factory=lambda: Schedule(steps=5000, batch_size=96, lr=2e-3))
    unet: Schedule = field(default_factory=lambda: Schedule(steps=1200, batch_size=64, lr=1.5e-3))
    """First phase of the U-Net: uniform weights, as for SD v1.5."""
    unet_velocity: Schedule = field(default_factory=lambda: Schedule(steps=9000, batch_size=32, lr=1e-3))
    """Second phase of the U-Net: larger weights for strong noise."""

    def __post_init__(self):
        if unknown := set(self.only) - {"tokenizer", "vae", "clip", "dino", "judge", "unet"}:
            raise ValueError(f"only={sorted(unknown)} is unknown; allowed: tokenizer, vae, clip, dino, judge, unet")


def main(arguments: list[str]) -> None:
    recipe = load_config(arguments, Recipe)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    output, work = Path(recipe.output), Path(recipe.work)
    settings = {k: v for k, v in asdict(recipe).items() if k not in ("output", "work", "only", "threads")}
    # In the checkpoints' names, so that a run never resumes from checkpoints of another recipe.
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]

    def checkpoint(model: str) -> Path:
        return work / f"{model}-{digest}.pt"

    diffusion_folder = output / "stable-diffusion"

    def missing(model: str, folder: Path) -> bool:
        return model in recipe.only and not folder.exists()

    def pool():
        return draw_pool(work, recipe.pictures, recipe.seed, recipe.told)

    def options(model: str) -> dict:
        schedule = getattr(recipe, model)
        return {"steps": schedule.steps, "batch_size": schedule.batch_size, "lr": schedule.lr, "seed": recipe.seed}

    if missing("tokenizer", output / "tokenizer"):
        train_prompt_tokenizer(output / "tokenizer", sentences(8000, recipe.seed), recipe.vocabulary)
    if missing("vae", diffusion_folder / "vae"):
        vae = stable_diffusion.train_autoencoder(pool(), checkpoint("vae"), **options("vae"))
        stable_diffusion.train_decoder(vae, pool(), checkpoint("decoder"), **options("decoder"))
        write(vae, diffusion_folder / "vae")
    if missing("clip", output / "clip"):
        tokenizer = train_clip_tokenizer(sentences(8000, recipe.seed), recipe.vocabulary, length=32)
        model = encoders.train_clip(pool(), tokenizer, checkpoint("clip"), **options("clip"))
        second = options("clip_patterns") | {"seed": recipe.seed + 1}
        model = encoders.train_clip(pool(), tokenizer, checkpoint("clip_patterns"), clip=model, **second)
        processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)
        write(model, output / "clip", tokenizer, processor)
    if missing("clip", diffusion_folder / "text_encoder"):
        # As in SD v1.5, the text encoder comes from the same CLIP as the MLLM's vision encoder.
        clip_text = CLIPModel.from_pretrained(output / "clip", dtype=torch.float32).text_model
        text_encoder = CLIPTextModel(clip_text.config)
        text_encoder.load_state_dict(clip_text.state_dict())
        write(text_encoder, diffusion_folder / "text_encoder")
        CLIPTokenizer.from_pretrained(output / "clip").save_pretrained(diffusion_folder / "tokenizer")
    if missing("dino", output / "dino"):
        pairs = draw_pairs(work, recipe.pairs, recipe.seed)
        processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})
        write(encoders.train_dino(pairs, checkpoint("dino"), **options("dino")), output / "dino", processor)
    if missing("judge", output / "judge"):
        # The judge is trained on other scenes than the models that it judges.
        scenes = draw_pool(work, recipe.pictures, recipe.seed + 1, recipe.told)
        judge = encoders.train_judge(
            scenes, draw_pairs(work, recipe.pairs, recipe.seed + 1), checkpoint("judge"), **options("judge")
        )
        write(
            judge,
            output / "judge",
            ViTImageProcessorPil(size={"height": encoders.JUDGED_SIZE, "width": encoders.JUDGED_SIZE}),
        )
    if missing("unet", diffusion_folder / "unet"):
        modules = {
            "vae": AutoencoderKL.from_pretrained(diffusion_folder / "vae", dtype=torch.float32),
            "text_encoder": CLIPTextModel.from_pretrained(
                diffusion_folder / "text_encoder", dtype=torch.float32
            ).eval(),
            "tokenizer": CLIPTokenizer.from_pretrained(diffusion_folder / "tokenizer"),
        }
        unet = stable_diffusion.train_unet(
            pool(), **modules, checkpoint=checkpoint("unet"), weighting="uniform", **options("unet")
        )
        unet = stable_diffusion.train_unet(
            pool(),
            **modules,
            checkpoint=checkpoint("unet_velocity"),
            weighting="velocity",
            unet=unet,
            **options("unet_velocity") | {"seed": recipe.seed + 1},
        )
        pipeline = StableDiffusionPipeline(
            **modules,
            unet=unet,
            scheduler=stable_diffusion.scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        write(pipeline, diffusion_folder)


def write(model, folder: Path, *companions) -> None:
    """Save a model in half precision and its companions under a temporary name, then move them into place."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for part in (model.to(torch.float16), *companions):
        part.save_pretrained(partial)
    for config in partial.rglob("config.json"):  # diffusers records the local path from which a model was loaded
        content = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
        config.write_text(json.dumps(content, indent=2) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(partial, folder, dirs_exist_ok=True)
    shutil.rmtree(partial)
    print(f"wrote {folder}", flush=True)


if __name__ == "__main__":
    # Safe, because models are moved into place when complete; avoids a traceback from every process.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main(sys.argv[1:])
