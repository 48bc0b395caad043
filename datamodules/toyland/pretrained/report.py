"""How well the tiny models see and draw, on scenes that none of them was trained on.

    python -m datamodules.toyland.pretrained.report output=runs/toyland-pretrained
    python -m datamodules.toyland.pretrained.report model=runs/toyland/instruction_tuning

Writes report.json beside the models; of a trained `model` it prints what linear probes read from its states. All
figures are shares of right answers but for those that say otherwise.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer, ResNetForImageClassification, ViTModel

from datamodules.toyland.kinds import KINDS
from datamodules.toyland.language import PLACES, article
from datamodules.toyland.pretrained.data import LABELS, LOOKS, Pool, draw_pool, pixels
from datamodules.toyland.pretrained.encoders import judged, normalized
from datamodules.toyland.scene import Scene, Subject, place, render, sample_scene
from kosmosg.config import load_config
from kosmosg.files import write_text
from kosmosg.pipeline import KosmosGPipeline

GUIDANCE, STEPS = 4.0, 8


@dataclass
class Options:
    output: str = str(Path(__file__).parents[1] / "weights")
    """Folder of the models."""
    work: str = "data/toyland/pretrained"
    """Where the drawn images are cached."""
    scenes: int = 1000
    """Held-out scenes; half as many individuals are told apart, and as many pictures drawn from words."""
    seed: int = 100
    """Of the held-out scenes: another than any that trained."""
    model: str | None = None
    """A run folder: probe its states in place of the tiny models."""


@torch.no_grad()
def report(options: Options) -> dict[str, dict[str, float]]:
    """Figures by network."""
    folder = Path(options.output)
    pool = draw_pool(Path(options.work), options.scenes, options.seed, 0.8)
    clip, tokenizer = CLIPModel.from_pretrained(folder / "clip").float(), CLIPTokenizer.from_pretrained(folder / "clip")
    judge = ResNetForImageClassification.from_pretrained(folder / "judge").float().eval()
    dino = ViTModel.from_pretrained(folder / "dino", add_pooling_layer=False).float()
    vae = AutoencoderKL.from_pretrained(folder / "stable-diffusion" / "vae").float()
    alone = torch.nonzero(pool.subjects == 1)[:, 0]
    found = {
        "clip": zero_shot(clip, tokenizer, pool, alone) | text_side(clip, tokenizer, pool),
        "judge": of_judge(judge, pool.images[alone], pool.labels[alone]),
        "dino": {},
        "vae": {},
    }
    portraits, elsewhere = individuals(options.scenes // 2, options.seed)
    features = {
        "judge": lambda images: judge.resnet(judged(images)).pooler_output.flatten(1),
        "dino": lambda images: dino(pixel_values=pixels(images)).last_hidden_state[:, 0],
    }
    for name, encode in features.items():
        found[name]["one of eight individuals of a kind"] = told_apart(encode, portraits, elsewhere)
    again = decoded(vae, pool.images[alone])
    error = (pixels(again) - pixels(pool.images[alone])).square().mean((1, 2, 3))
    found["vae"] = of_judge(judge, again, pool.labels[alone]) | {
        "PSNR in dB": float((10 * torch.log10(4 / error)).mean())
    }
    found["stable-diffusion"] = text_to_image(folder, judge, options)
    return found


def of_judge(judge: ResNetForImageClassification, images: Tensor, labels: Tensor) -> dict[str, float]:
    """By group of labels."""
    parts = answers(judge, images)
    return {
        name: share(part.argmax(-1) == labels[:, i]) for i, (name, part) in enumerate(zip(LABELS, parts, strict=True))
    }


def answers(judge: ResNetForImageClassification, images: Tensor) -> tuple[Tensor, ...]:
    """Logits of each group of labels."""
    logits = torch.cat([judge(judged(part)).logits for part in images.split(100)])
    return logits.split([len(names) for names in LABELS.values()], dim=-1)


def zero_shot(clip: CLIPModel, tokenizer: CLIPTokenizer, pool: Pool, alone: Tensor) -> dict[str, float]:
    """Kind of images by the nearest of sixteen texts: the mean over all places in scenes, "a boot" for crops."""

    def texts(lines: list[str]) -> Tensor:
        features = clip.get_text_features(**tokenizer(lines, padding=True, return_tensors="pt")).pooler_output
        return F.normalize(F.normalize(features, dim=-1).mean(0), dim=-1)

    def right(images: Tensor, kinds: Tensor, classes: Tensor) -> float:
        parts = [clip.get_image_features(pixel_values=normalized(part)).pooler_output for part in images.split(100)]
        return share((F.normalize(torch.cat(parts), dim=-1) @ classes.T).argmax(-1) == kinds)

    bare = torch.stack([texts([article(kind)]) for kind in KINDS])
    placed = torch.stack([texts([article(kind), *(f"{article(kind)} {tail}" for tail in PLACES)]) for kind in KINDS])
    kinds = pool.labels[:, 0]
    return {
        "kind, scenes": right(pool.images[alone], kinds[alone], placed),
        "kind, crops on white": right(pool.crops[:, 0], kinds, bare),
        "kind, crops with background": right(pool.crops[:, 1], kinds, bare),
    }


def text_side(clip: CLIPModel, tokenizer: CLIPTokenizer, pool: Pool) -> dict[str, float]:
    """Which of four patterns a crop has, by captions alike but for that word; and how far a word moves the states that
    the U-Net reads: ‖t − t'‖² / ‖t‖²."""
    patterns, groups = ["stripes", "spots", "checks", "patches"], list(LABELS)
    hits = []
    with_pattern = [i for i, line in enumerate(pool.told) if any(f" {pattern}" in line for pattern in patterns)]
    for start in range(0, len(with_pattern), 100):
        rows = with_pattern[start : start + 100]
        names = [LABELS["pattern"][pool.labels[row, groups.index("pattern")]] for row in rows]
        lines = [pool.told[row].replace(own, other) for row, own in zip(rows, names, strict=True) for other in patterns]
        features = clip.get_text_features(**tokenizer(lines, padding=True, return_tensors="pt")).pooler_output
        images = clip.get_image_features(pixel_values=normalized(pool.crops[rows, 0])).pooler_output
        guess = torch.einsum("nd,npd->np", images, F.normalize(features, dim=-1).view(len(rows), 4, -1)).argmax(-1)
        hits.append(guess == torch.tensor([patterns.index(name) for name in names]))

    def states(line: str) -> Tensor:
        length = tokenizer.model_max_length
        ids = tokenizer([line], padding="max_length", max_length=length, return_tensors="pt").input_ids
        return clip.text_model(input_ids=ids).last_hidden_state

    base = states("a red boot with yellow stripes on the beach")
    moved = {
        word: float((states(f"a {line} on the beach") - base).square().sum() / base.square().sum())
        for word, line in {
            "pattern": "red boot with yellow spots", "colour": "blue boot with yellow stripes",
            "kind": "red clock with yellow stripes",
        }.items()
    }  # fmt: skip
    return {"pattern, by captions": share(torch.cat(hits))} | {
        f"states moved by {word}": m for word, m in moved.items()
    }


def individuals(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Eight studio portraits of one kind each, N×8×3×S×S, and the first of them elsewhere, N×3×S×S."""
    portraits, elsewhere = [], []
    for number in range(count):
        rng = np.random.default_rng([seed, 0x1D, number])
        kind = str(rng.choice(list(KINDS)))
        subjects = [Subject.sample(rng, kind) for _ in range(8)]
        shown = [render(Scene((replace(place(rng, [one])[0], x=0.5, y=0.5, half=0.4),))).image for one in subjects]
        portraits.append(np.stack([np.asarray(image) for image in shown]))
        scene = replace(sample_scene(rng, [subjects[0]]), light="", style="")
        elsewhere.append(np.asarray(render(scene).image))
    return (
        torch.from_numpy(np.stack(portraits)).permute(0, 1, 4, 2, 3),
        torch.from_numpy(np.stack(elsewhere)).permute(0, 3, 1, 2),
    )


def told_apart(encode, portraits: Tensor, elsewhere: Tensor) -> float:
    """How often the portrait of the one elsewhere is the nearest of the eight."""
    count = len(portraits)
    known = F.normalize(torch.cat([encode(part) for part in portraits.flatten(0, 1).split(100)]), dim=-1)
    met = F.normalize(torch.cat([encode(part) for part in elsewhere.split(100)]), dim=-1)
    return share(torch.einsum("nd,npd->np", met, known.view(count, 8, -1)).argmax(-1) == 0)


def decoded(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Through the VAE and back, uint8."""
    parts = [vae.decode(vae.encode(pixels(part)).latent_dist.mean).sample for part in images.split(100)]
    return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def text_to_image(folder: Path, judge: ResNetForImageClassification, options: Options) -> dict[str, float]:
    """Kind and pattern of pictures drawn from words alone, by the judge."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "stable-diffusion", torch_dtype=torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    rng, groups = np.random.default_rng([options.seed, 0x7E]), list(LABELS)
    subjects = [Subject.sample(rng, list(KINDS)[number % len(KINDS)]) for number in range(options.scenes // 2)]
    kinds = torch.tensor([list(KINDS).index(subject.kind) for subject in subjects])
    looks = torch.tensor([LABELS["pattern"].index(subject.look.pattern) for subject in subjects])
    tails = [str(rng.choice(PLACES)) for _ in subjects]
    told = [" ".join((one.look.words[0], one.kind, one.look.words[1])).strip() for one in subjects]
    figures: dict[str, float] = {}
    for name, nouns in (("untold", [subject.kind for subject in subjects]), ("told", told)):
        lines = [f"{article(noun)} {tail}" for noun, tail in zip(nouns, tails, strict=True)]
        arrays = [
            pipeline(
                lines[start : start + 50], num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="pt",
                generator=torch.Generator().manual_seed(start),
            ).images
            for start in range(0, len(lines), 50)
        ]  # fmt: skip
        images = (torch.cat(arrays) * 255).round().to(torch.uint8)
        parts = answers(judge, images)
        right = parts[0].argmax(-1) == kinds
        figures[f"kind, {name}"] = share(right)
        if name == "told":
            figures["pattern, told"] = share(parts[groups.index("pattern")].argmax(-1) == looks)
        else:
            worst = min(KINDS, key=lambda kind: share(right[kinds == list(KINDS).index(kind)]))
            figures[f"kind, untold, of the worst: {worst}"] = share(right[kinds == list(KINDS).index(worst)])
    return figures


@torch.no_grad()
def probes(options: Options) -> dict[str, dict[str, float]]:
    """What a linear map reads of the subject's look from the states on the way of one image, by place.

    The map is a ridge regression on the labels of twice as many crops on white; the prompt is the image alone.
    """
    assert options.model is not None
    pipe = KosmosGPipeline.from_pretrained(options.model, str(Path(options.output) / "stable-diffusion"))
    pools = [
        draw_pool(Path(options.work), count, options.seed + offset, 0.8)
        for offset, count in ((1, 2 * options.scenes), (0, options.scenes))
    ]
    found_at: dict[str, list[Tensor]] = {}
    for pool in pools:
        states: dict[str, list[Tensor]] = {}
        for start in range(0, len(pool), 100):
            crops = [Image.fromarray(array) for array in pool.crops[start : start + 100, 0].permute(0, 2, 3, 1).numpy()]
            batch = pipe.encoder.collate([pipe.encoder([crop]) for crop in crops])
            tower = pipe.mllm.vision(batch.images)
            hidden, padding = pipe.mllm.hidden_states(batch)
            found = {
                "vision encoder": tower,
                "resampler": pipe.mllm.resampler(tower),
                "MLLM's image tokens": hidden[batch.image_mask].view(len(crops), -1, hidden.shape[-1]),
                "M": pipe.aligner(hidden, padding).states,
            }
            for where, tensor in found.items():
                states.setdefault(where, []).append(tensor.flatten(1))
        for where, parts in states.items():
            found_at.setdefault(where, []).append(torch.cat(parts).double())
    known, met = (pool.labels[:, :LOOKS] for pool in pools)
    return {where: read_linearly(*tensors, known, met) for where, tensors in found_at.items()}


def read_linearly(known: Tensor, met: Tensor, labels: Tensor, asked: Tensor) -> dict[str, float]:
    """By group of labels, how often ridge regression from `known`, N×F, is right on `met`."""
    mean, spread = known.mean(0), known.std(0) + 1e-6
    known, met = (known - mean) / spread, (met - mean) / spread
    kernel = known @ known.T
    solved = torch.linalg.cholesky(kernel + 0.1 * kernel.diagonal().mean() * torch.eye(len(known), dtype=known.dtype))
    found = {}
    for i, (group, names) in enumerate(list(LABELS.items())[:LOOKS]):
        target = F.one_hot(labels[:, i], len(names)).double()
        scores = met @ known.T @ torch.cholesky_solve(target - target.mean(0), solved) + target.mean(0)
        found[group] = share(scores.argmax(-1) == asked[:, i])
    return found


def share(right: Tensor) -> float:
    return float(right.float().mean())


def main(arguments: list[str]) -> None:
    options = load_config(arguments, Options)
    found = report(options) if options.model is None else probes(options)
    for network, figures in found.items():
        for name, figure in figures.items():
            print(f"{network:20} {name:48} {figure:.3f}")
    if options.model is not None:
        return
    rounded = {network: {name: round(figure, 4) for name, figure in of.items()} for network, of in found.items()}
    written = {"scenes": options.scenes, "seed": options.seed, **rounded}
    write_text(Path(options.output) / "report.json", json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
