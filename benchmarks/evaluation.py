"""An evaluation from prompts to scores: the project's way against the released loop, over the same networks.

The released loop takes five prompts at a time, encodes each subject's image and the null condition for every batch,
with the language model's head, and looks at the subject's image once more for every pair that it scores.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.comparison import Comparison
from benchmarks.config import BenchmarkConfig, read_config
from benchmarks.convert_memory import write_tokenizer
from benchmarks.models import Parts, scheduler
from evaluation.images.conditions import Conditions
from evaluation.images.generation import Batch
from kosmosg.acceleration import Acceleration, accelerate
from kosmosg.models.build import vision_config
from kosmosg.pipeline import KosmosGPipeline
from kosmosg.prompt import parse_prompt

GUIDANCE_SCALE = 7.5


def measure(arguments: Sequence[str]) -> dict[str, Any]:
    """See `benchmarks`."""
    return comparison(read_config(arguments)).measure()


class World:
    """A pipeline, subjects with a picture each, prompts, and a judge that sees as the MLLM's image tower does."""

    def __init__(self, config: BenchmarkConfig):
        self.config, stage, parts = config, config.evaluation, Parts(config)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = write_tokenizer(Path(folder), max(config.vocabulary, 32))
        config.vocabulary = len(tokenizer)
        self.pipeline = KosmosGPipeline(
            *(part.eval().requires_grad_(False) for part in (parts.mllm(), parts.aligner())),
            tokenizer,
            *(part.eval().requires_grad_(False) for part in (parts.unet(), parts.vae())),
            scheduler(),
        )
        source = np.random.default_rng(config.seed)
        side = config.model.mllm.vision.image_size
        pixels = source.integers(0, 256, (stage.subjects, side, side, 3), dtype=np.uint8)
        self.subjects = [Image.fromarray(picture) for picture in pixels]
        vision = CLIPVisionConfig(**vision_config(config.model.mllm.vision))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            judge = CLIPVisionModel(vision)
        self.judge = judge.eval().requires_grad_(False).to(config.torch_device())
        self.prompts = [
            (f"<i> and some words, {template}", subject)
            for subject in range(stage.subjects)
            for template in range(stage.templates)
            for _ in range(stage.images)
        ]

    def batch(self, begin: int, end: int) -> Batch:
        chosen = self.prompts[begin:end]
        images = [[self.subjects[subject]] for _, subject in chosen]
        return Batch([prompt for prompt, _ in chosen], images, list(range(begin, begin + len(chosen))))

    def sample(self, condition: Tensor, null: Tensor, seeds: Sequence[int]) -> list[Image.Image]:
        return self.pipeline.sampler(
            condition,
            null,
            num_inference_steps=self.config.evaluation.steps,
            guidance_scale=GUIDANCE_SCALE,
            seeds=seeds,
            height=self.config.model.image_size,
            width=self.config.model.image_size,
        )

    @torch.inference_mode()
    def look(self, images: list[Image.Image]) -> Tensor:
        """The judge's features."""
        pixels = torch.stack([self.pipeline.encoder.image_transform(image) for image in images])
        return self.judge(pixels.to(self.judge.device)).pooler_output.cpu()

    def ours(self, batch_size: int) -> float:
        """Large batches across subjects; conditions, the null condition and features of references once."""
        conditions, references, made = Conditions(self.pipeline), self.look(self.subjects), []
        for begin in range(0, len(self.prompts), batch_size):
            batch = self.batch(begin, begin + batch_size)
            made += self.sample(conditions(batch), self.pipeline.null_condition, batch.seeds)
        found = torch.cat([self.look(made[i : i + batch_size]) for i in range(0, len(made), batch_size)])
        return float(torch.cosine_similarity(found, references[[subject for _, subject in self.prompts]]).mean())

    def released(self, conditions_once: bool = False, references_once: bool = False) -> float:
        """See above; each habit can be left out alone."""
        stage, scores = self.config.evaluation, []
        references = self.look(self.subjects) if references_once else None
        conditions = Conditions(self.pipeline)
        rows = stage.released_prompts * stage.images
        for begin in range(0, len(self.prompts), rows):
            batch = self.batch(begin, begin + rows)
            if conditions_once:
                condition, null = conditions(batch), self.pipeline.null_condition
            else:
                condition, null = self._encoded(batch), self._encoded_null()
            made = self.sample(condition, null, batch.seeds)
            subjects = [subject for _, subject in self.prompts[begin : begin + rows]]
            for image, subject in zip(made, subjects, strict=True):
                known = references is not None
                reference = references[[subject]] if known else self.look([self.subjects[subject]])
                scores.append(torch.cosine_similarity(self.look([image]), reference))
        return float(torch.cat(scores).mean())

    @torch.no_grad()
    def _encoded(self, batch: Batch) -> Tensor:
        pipeline, images = self.pipeline, self.config.evaluation.images
        chosen = range(0, len(batch.prompts), images)
        segments = [parse_prompt(batch.prompts[i], batch.images[i]) for i in chosen]
        prompt = pipeline.encoder.collate([pipeline.encoder(row) for row in segments]).to(pipeline.mllm.device)
        hidden = pipeline.mllm(prompt)
        pipeline.mllm.logits(hidden)
        return pipeline.aligner(hidden, prompt.padding).repeat_interleave(images, dim=0)

    @torch.no_grad()
    def _encoded_null(self) -> Tensor:
        prompt = self.pipeline.mllm.null_prompt()
        hidden = self.pipeline.mllm(prompt)
        self.pipeline.mllm.logits(hidden)
        return self.pipeline.aligner(hidden, prompt.padding)


def comparison(config: BenchmarkConfig) -> Comparison:
    """Default, released loop, levers, scaling over subjects."""
    stage, world = config.evaluation, World(config)
    quick = World(config)
    accelerate(
        quick.pipeline.unet, quick.pipeline.vae, Acceleration(config.sampling.channels_last, config.sampling.compile)
    )
    together = min(stage.batch_size, len(world.prompts))
    return Comparison(
        name="evaluation",
        config=config,
        ours=lambda: quick.ours(together),
        theirs=world.released,
        against="the released loop",
        items=len(world.prompts),
        unit="scored images",
        training=False,
        levers={
            "conditions and null condition once": lambda: world.released(conditions_once=True),
            "features of references once": lambda: world.released(references_once=True),
            "large batches and both, image decoder as it is": lambda: world.ours(together),
            "accelerated image decoder": quick.released,
        },
        facts={
            "prompts": f"{stage.subjects} subjects × {stage.templates} prompts × {stage.images} images",
            "steps": stage.steps,
            "batch": f"{together} images, released {stage.released_prompts} prompts",
            "difference of the mean score": f"{abs(quick.ours(together) - world.released()):.1e}",
        },
    )
