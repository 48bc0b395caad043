"""Sample grids: draw the images of fixed held-out prompts during training.

A row shows a prompt, its input images, the stage's reference image (`StageModule.reference_images`), the image before
training and the current one. The noise of a row is fixed, so that differences come from the model alone.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from PIL import Image, ImageDraw, ImageFont, ImageOps

from kosmosg.batches import MicroBatch
from kosmosg.condition import Condition
from kosmosg.config import ConfigError
from kosmosg.files import replaced
from kosmosg.pipeline import evaluating
from kosmosg.prompt import PromptEncoder
from kosmosg.sampling import DiffusionSampler

CELL, GAP, TEXT_WIDTH, HEADER = 128, 6, 190, 22  # pixels
FONT_SIZE, LETTER_WIDTH = 13, 7
INK, FAINT, PAPER = (20, 20, 20), (120, 120, 120), (255, 255, 255)


@dataclass
class GridConfig:
    every: int = 500
    """Steps between grids; one is also drawn after the last step. 0: no grids."""
    prompts: int = 8
    """Number of rows: held-out prompts, spread over the first validation batch."""
    steps: int = 20
    """Number of sampling steps."""
    guidance_scale: float = 6.0
    """Scale of classifier-free guidance, eq. 4."""
    seed: int = 0
    """Seed of the initial noise; row r has seed + r."""

    def __post_init__(self) -> None:
        for name, minimum in (("every", 0), ("prompts", 1), ("steps", 1), ("seed", 0)):
            if getattr(self, name) < minimum:
                raise ValueError(f"grids.{name} is {getattr(self, name)}; allowed: {minimum} or more")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"grids.guidance_scale is {self.guidance_scale}; allowed: finite numbers")


@dataclass
class Row:
    """A row of the grid: a prompt's text, its input images and the output images."""

    text: str
    inputs: list[Image.Image]
    outputs: list[Image.Image]


class ImageGrid(Callback):
    """Writes `folder/step-00000500.png` and logs it to W&B as `grid`. Needs held-out data.

    Args:
        sampler: sampler with the image decoder.
        encoder: encoder of the prompts, which turns them back into text and images.
    """

    def __init__(self, config: GridConfig, folder: Path, sampler: DiffusionSampler, encoder: PromptEncoder):
        self.config, self.folder, self.sampler, self.encoder = config, folder, sampler, encoder
        self.rows: list[Row] = []

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        if not loader:
            raise ConfigError("grids need held-out prompts: set `validation` of a source in data, or grids.every=0")
        batch: MicroBatch = next(iter(loader))
        count = min(len(batch), self.config.prompts)
        # Sharded networks run on all ranks together, so all draw the prompts of rank 0.
        batch = trainer.strategy.broadcast(batch.rows([row * len(batch) // count for row in range(count)]))
        self.prompt = batch.prompt.to(pl_module.device)
        self.sampler.to(pl_module.device)
        reference = pl_module.reference_images(batch, self._images)
        before = self._before(pl_module, trainer.is_global_zero)
        self.rows = [
            Row(text, inputs, [reference[row], before[row]])
            for row, (text, inputs) in enumerate(self.encoder.describe(batch.prompt))
        ]

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step % self.config.every == 0 or trainer.global_step == trainer.max_steps:
            self.draw(trainer, pl_module)

    def draw(self, trainer: lightning.Trainer, module: Any) -> None:
        """Draw and write the grid of this step."""
        images = self.sample(module)
        if not trainer.is_global_zero:
            return
        rows = [Row(row.text, row.inputs, [*row.outputs, image]) for row, image in zip(self.rows, images, strict=True)]
        file = self.folder / f"step-{trainer.global_step:08d}.png"
        sheet = contact_sheet(rows, ["reference", "before", f"step {trainer.global_step}"])
        with replaced(file) as temporary:
            sheet.save(temporary, format="png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("grid", [str(file)])

    def sample(self, module: Any) -> list[Image.Image]:
        """Draw an image for each prompt with the current model."""
        with torch.no_grad(), evaluating(module):
            batch = self.prompt.join(module.mllm.unconditional_prompt())
            conditions = module.model.condition(batch)
        null = self.sampler.decoder.spec.null(conditions.rows(slice(-1, None)))
        return self._images(conditions.rows(slice(0, -1)), null)

    def _images(self, condition: Condition, unconditional: Condition) -> list[Image.Image]:
        return self.sampler(
            condition,
            unconditional,
            num_inference_steps=self.config.steps,
            guidance_scale=self.config.guidance_scale,
            seeds=range(self.config.seed, self.config.seed + len(condition.states)),
        )

    def _before(self, module: Any, write: bool) -> list[Image.Image]:
        """Images before training: drawn at the first start, and read from disk when the run is resumed."""
        folder = self.folder / "before"
        files = [folder / f"{row:02d}.png" for row in range(len(self.prompt))]
        if all(file.is_file() for file in files):
            return [Image.open(file).convert("RGB") for file in files]
        images = self.sample(module)
        if write:
            with replaced(folder) as temporary:
                temporary.mkdir()
                for file, image in zip(files, images, strict=True):
                    image.save(temporary / file.name)
        return images


def contact_sheet(rows: Sequence[Row], titles: Sequence[str]) -> Image.Image:
    """Arrange text, inputs and outputs of each row from left to right; `titles` are those of the output columns."""
    inputs = max((len(row.inputs) for row in rows), default=0)
    lefts = [TEXT_WIDTH + column * (CELL + GAP) for column in range(inputs + len(titles))]
    sheet = Image.new("RGB", (lefts[-1] + CELL + 2 * GAP, HEADER + len(rows) * (CELL + GAP)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=FONT_SIZE)
    heads = {GAP: "prompt"} | ({TEXT_WIDTH: "input"} if inputs else {})
    for left, head in (heads | dict(zip(lefts[inputs:], titles, strict=True))).items():
        draw.text((left, GAP // 2), head, fill=FAINT, font=font)
    for number, row in enumerate(rows):
        top = HEADER + number * (CELL + GAP)
        lines = textwrap.wrap(row.text, (TEXT_WIDTH - 2 * GAP) // LETTER_WIDTH)
        draw.multiline_text((GAP, top), "\n".join(lines), fill=INK, font=font)
        for column, image in [*enumerate(row.inputs), *enumerate(row.outputs, start=inputs)]:
            # Small images are enlarged by a whole factor without smoothing, so that every pixel is visible.
            enlarge = image.width < CELL and CELL % image.width == 0
            resampling = Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS
            sheet.paste(ImageOps.pad(image.convert("RGB"), (CELL, CELL), resampling, PAPER), (lefts[column], top))
    return sheet
