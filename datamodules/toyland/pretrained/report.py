"""Measure the quality of the tiny models on scenes on which none of them was trained.

    python -m datamodules.toyland.pretrained.report output=runs/toyland-pretrained
    python -m datamodules.toyland.pretrained.report model=runs/toyland/instruction_tuning

Writes report.json next to the models. With a trained `model`, prints the accuracy of linear probes on its states. All
figures are accuracies unless their names say otherwise.
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
    """Configuration of the report."""

    output: str = str(Path(__file__).parents[1] / "weights")
    """Folder of the models."""
    work: str = "data/toyland/pretrained"
    """Folder of cached images."""
    scenes: int = 1000
    """Number of held-out scenes; half as many individuals are identified, and half as many images generated."""
    seed: int = 100
    """Seed of the held-out scenes; must differ from the seeds used in training."""
    model: str | None = None
    """Run folder of a model whose states are probed instead of reporting on the tiny models."""


@torch.no_grad()
def report(options: Options) -> dict[str, dict[str, float]]:
    """Return figures by network."""
    folder = Path(options.output)
    pool = draw_pool(Path(options.work), options.scenes, options.seed, 0.8)
    clip, tokenizer = CLIPModel.from_pretrained(folder / "clip").float(), CLIPTokenizer.from_pretrained(folder / "clip")
    judge = ResNetForImageClassification.from_pretrained(folder / "judge").float().eval()
    dino = ViTModel.from_pretrained(folder / "dino", add_pooling_layer=False).float()
    vae = AutoencoderKL.from_pretrained(folder / "stable-diffusion" / "vae").float()
    alone = torch.nonzero(pool.subjects == 1)[:, 0]
    figures = {
        "clip": zero_shot(clip, tokenizer, pool, alone) | text_sensitivity(clip, tokenizer, pool),
        "judge": judge_accuracy(judge, pool.images[alone], pool.labels[alone]),
        "dino": {},
        "vae": {},
    }
    portraits, elsewhere = individuals(options.scenes // 2, options.seed)
    features = {
        "judge": lambda images: judge.resnet(judged(images)).pooler_output.flatten(1),
        "dino": lambda images: dino(pixel_values=pixels(images)).last_hidden_state[:, 0],
    }
    for name, encode in features.items():
        figures[name]["one of eight individuals of a kind"] = identification(encode, portraits, elsewhere)
    reconstructed = reconstruct(vae, pool.images[alone])
    error = (pixels(reconstructed) - pixels(pool.images[alone])).square().mean((1, 2, 3))
    figures["vae"] = judge_accuracy(judge, reconstructed, pool.labels[alone]) | {
        "PSNR in dB": float((10 * torch.log10(4 / error)).mean())
    }
    figures["stable-diffusion"] = text_to_image(folder, judge, options)
    return figures


def judge_accuracy(judge: ResNetForImageClassification, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the judge's accuracy by group of labels."""
    parts = judge_logits(judge, images)
    return {
        name: share(part.argmax(-1) == labels[:, i]) for i, (name, part) in enumerate(zip(LABELS, parts, strict=True))
    }


def judge_logits(judge: ResNetForImageClassification, images: Tensor) -> tuple[Tensor, ...]:
    """Return the judge's logits by group of labels."""
    logits = torch.cat([judge(judged(part)).logits for part in images.split(100)])
    return logits.split([len(names) for names in LABELS.values()], dim=-1)


def zero_shot(clip: CLIPModel, tokenizer: CLIPTokenizer, pool: Pool, alone: Tensor) -> dict[str, float]:
    """Zero-shot accuracy of kinds with sixteen texts: "a boot" for crops, the mean over all places for scenes."""

    def texts(lines: list[str]) -> Tensor:
        features = clip.get_text_features(**tokenizer(lines, padding=True, return_tensors="pt")).pooler_output
        return F.normalize(F.normalize(features, dim=-1).mean(0), dim=-1)

    def accuracy(images: Tensor, kinds: Tensor, classes: Tensor) -> float:
        parts = [clip.get_image_features(pixel_values=normalized(part)).pooler_output for part in images.split(100)]
        return share((F.normalize(torch.cat(parts), dim=-1) @ classes.T).argmax(-1) == kinds)

    bare = torch.stack([texts([article(kind)]) for kind in KINDS])
    placed = torch.stack([texts([article(kind), *(f"{article(kind)} {tail}" for tail in PLACES)]) for kind in KINDS])
    kinds = pool.labels[:, 0]
    return {
        "kind, scenes": accuracy(pool.images[alone], kinds[alone], placed),
        "kind, crops on white": accuracy(pool.crops[:, 0], kinds, bare),
        "kind, crops with background": accuracy(pool.crops[:, 1], kinds, bare),
    }


def text_sensitivity(clip: CLIPModel, tokenizer: CLIPTokenizer, pool: Pool) -> dict[str, float]:
    """Accuracy of classifying crops by captions that differ only in the word of the pattern, and the change of the
    states that the U-Net reads when a word changes: ‖t − t'‖² / ‖t‖²."""
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
    """Draw studio portraits of eight individuals of one kind, N×8×3×S×S, and a scene with the first one, N×3×S×S."""
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


def identification(encode, portraits: Tensor, elsewhere: Tensor) -> float:
    """Return how often the portrait of the individual in the scene is the nearest of the eight."""
    count = len(portraits)
    references = F.normalize(torch.cat([encode(part) for part in portraits.flatten(0, 1).split(100)]), dim=-1)
    queries = F.normalize(torch.cat([encode(part) for part in elsewhere.split(100)]), dim=-1)
    return share(torch.einsum("nd,npd->np", queries, references.view(count, 8, -1)).argmax(-1) == 0)


def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode and decode images with the VAE, uint8."""
    parts = [vae.decode(vae.encode(pixels(part)).latent_dist.mean).sample for part in images.split(100)]
    return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def text_to_image(folder: Path, judge: ResNetForImageClassification, options: Options) -> dict[str, float]:
    """Accuracy of kinds and patterns, according to the judge, in images generated from texts."""
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
        parts = judge_logits(judge, images)
        correct = parts[0].argmax(-1) == kinds
        figures[f"kind, {name}"] = share(correct)
        if name == "told":
            figures["pattern, told"] = share(parts[groups.index("pattern")].argmax(-1) == looks)
        else:
            worst = min(KINDS, key=lambda kind: share(correct[kinds == list(KINDS).index(kind)]))
            figures[f"kind, untold, of the worst: {worst}"] = share(correct[kinds == list(KINDS).index(worst)])
    return figures


@torch.no_grad()
def probes(options: Options) -> dict[str, dict[str, float]]:
    """Accuracy of linear probes for the subject's look at several places of the model. The prompt is one image.

    The probes are ridge regressions, fitted to the labels of twice as many crops on white.
    """
    assert options.model is not None
    pipe = KosmosGPipeline.from_pretrained(options.model, str(Path(options.output) / "stable-diffusion"))
    pools = [
        draw_pool(Path(options.work), count, options.seed + offset, 0.8)
        for offset, count in ((1, 2 * options.scenes), (0, options.scenes))
    ]
    features: dict[str, list[Tensor]] = {}
    for pool in pools:
        states: dict[str, list[Tensor]] = {}
        for start in range(0, len(pool), 100):
            crops = [Image.fromarray(array) for array in pool.crops[start : start + 100, 0].permute(0, 2, 3, 1).numpy()]
            batch = pipe.encoder.collate([pipe.encoder([crop]) for crop in crops])
            vision = pipe.mllm.vision(batch.images)
            hidden, padding = pipe.mllm.hidden_states(batch)
            outputs = {
                "vision encoder": vision,
                "resampler": pipe.mllm.resampler(vision),
                "MLLM's image tokens": hidden[batch.image_mask].view(len(crops), -1, hidden.shape[-1]),
                "M": pipe.aligner(hidden, padding).states,
            }
            for where, tensor in outputs.items():
                states.setdefault(where, []).append(tensor.flatten(1))
        for where, parts in states.items():
            features.setdefault(where, []).append(torch.cat(parts).double())
    labels, test_labels = (pool.labels[:, :LOOKS] for pool in pools)
    return {where: ridge_accuracy(*tensors, labels, test_labels) for where, tensors in features.items()}


def ridge_accuracy(train: Tensor, test: Tensor, labels: Tensor, test_labels: Tensor) -> dict[str, float]:
    """Fit a ridge regression to features `train`, N×F, and return its accuracy on `test` by group of labels."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    kernel = train @ train.T
    factor = torch.linalg.cholesky(kernel + 0.1 * kernel.diagonal().mean() * torch.eye(len(train), dtype=train.dtype))
    accuracy = {}
    for i, (group, names) in enumerate(list(LABELS.items())[:LOOKS]):
        target = F.one_hot(labels[:, i], len(names)).double()
        scores = test @ train.T @ torch.cholesky_solve(target - target.mean(0), factor) + target.mean(0)
        accuracy[group] = share(scores.argmax(-1) == test_labels[:, i])
    return accuracy


def share(correct: Tensor) -> float:
    return float(correct.float().mean())


def main(arguments: list[str]) -> None:
    options = load_config(arguments, Options)
    results = report(options) if options.model is None else probes(options)
    for network, figures in results.items():
        for name, figure in figures.items():
            print(f"{network:20} {name:48} {figure:.3f}")
    if options.model is not None:
        return
    rounded = {name: {key: round(figure, 4) for key, figure in figures.items()} for name, figures in results.items()}
    content = {"scenes": options.scenes, "seed": options.seed, **rounded}
    write_text(Path(options.output) / "report.json", json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
