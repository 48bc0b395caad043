"""What the model draws for fixed held-out prompts, as training goes on: input images, reference, before, now.

A row is a prompt. The reference is the sample's own target in stage 3, and in stage 2 what Stable Diffusion itself
draws for the caption. Noise is the same at every step, so that a change in a picture is a change of the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import Tensor

from callbacks.contact_sheet import Row, contact_sheet, to_image
from kosmosg.models.text_target import TextTarget
from kosmosg.pipeline import evaluating
from kosmosg.prompt import PromptBatch
from kosmosg.sampling import DiffusionSampler
from kosmosg.tokenizer import Tokenizer
from lightning_modules.instruction_tuning import with_null_row


@dataclass
class GridConfig:
    every: int = 500
    """Updates between grids; 0 for none. One is also drawn after the last update."""
    prompts: int = 8
    """Rows: held-out prompts, spread over the first validation batch."""
    steps: int = 20
    """Sampling steps."""
    guidance_scale: float = 6.0
    """Weight of classifier-free guidance, eq. 4."""
    seed: int = 0
    """Of the starting noise; row r has seed + r."""

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("prompts", 1), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"grids.{name} is {getattr(self, name)}; allowed: {least} or more")


class ImageGrid(Callback):
    """Writes `folder/step-00000500.png` and logs it to W&B as `grid`. Needs held-out data.

    Args:
        sampler: U-Net, VAE and scheduler.
        tokenizer: writes the prompts' text.
        text_target: given in stage 2, for the reference of a caption.
    """

    def __init__(
        self,
        config: GridConfig,
        folder: Path,
        sampler: DiffusionSampler,
        tokenizer: Tokenizer,
        text_target: TextTarget | None = None,
    ):
        self.config, self.folder, self.sampler = config, folder, sampler
        self.tokenizer, self.text_target = tokenizer, text_target
        self.rows: list[Row] = []

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        loader = trainer.datamodule.val_dataloader()
        if not loader:
            raise ValueError("grids need held-out prompts: set validation= of a source in data, or grids.every=0")
        batch = next(iter(loader))
        chosen = spread(len(batch.prompt), self.config.prompts)
        # Sharded networks run on all processes at once, so all draw the first one's prompts.
        self.prompt = trainer.strategy.broadcast(select(batch.prompt, chosen)).to(pl_module.device)
        self.sampler.to(pl_module.device)
        reference = self._reference(batch, chosen, pl_module)
        before = self._before(pl_module, trainer.is_global_zero)
        self.rows = [
            Row(text, inputs, [reference[row], before[row]])
            for row, (text, inputs) in enumerate(describe(self.prompt, self.tokenizer))
        ]

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        step = trainer.global_step
        if step % self.config.every == 0 or step == trainer.max_steps:
            self.draw(trainer, pl_module)

    def draw(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Draw the grid of this step."""
        now = self.sample(module)
        if not trainer.is_global_zero:
            return
        reference = "Stable Diffusion" if self.text_target is not None else "target"
        rows = [Row(row.text, row.inputs, [*row.outputs, image]) for row, image in zip(self.rows, now, strict=True)]
        file = self.folder / f"step-{trainer.global_step:08d}.png"
        self.folder.mkdir(parents=True, exist_ok=True)
        contact_sheet(rows, [reference, "before", f"step {trainer.global_step}"]).save(file)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("grid", [str(file)])

    def sample(self, module: lightning.LightningModule) -> list[Image.Image]:
        """Draw each prompt with the model as it is now."""
        with torch.no_grad(), evaluating(module):
            batch = with_null_row(self.prompt, module.mllm.config.bos_id, module.mllm.config.pad_id)
            conditions = module.aligner(module.mllm(batch), batch.padding)
        return self._images(conditions[:-1], conditions[-1:])

    def _images(self, condition: Tensor, null_condition: Tensor) -> list[Image.Image]:
        return self.sampler(
            condition,
            null_condition,
            num_inference_steps=self.config.steps,
            guidance_scale=self.config.guidance_scale,
            seeds=range(self.config.seed, self.config.seed + len(condition)),
        )

    def _reference(self, batch: Any, chosen: Sequence[int], module: lightning.LightningModule) -> list[Image.Image]:
        if self.text_target is None:
            if batch.targets is None:  # the batch has moments in place of pixels
                moments = batch.moments[list(chosen)].to(module.device)
                return [
                    to_image(image, mean=(0.5,) * 3, std=(0.5,) * 3)
                    for image in module.image_decoder.mean_images(moments)
                ]
            return [to_image(batch.targets[row], mean=(0.5,) * 3, std=(0.5,) * 3) for row in chosen]
        empty = self.text_target.tokenize([""])
        ids = torch.cat([batch.clip_ids[list(chosen)], empty]).to(module.device)
        conditions = self.text_target.to(module.device)(ids)
        return self._images(conditions[:-1], conditions[-1:])

    def _before(self, module: lightning.LightningModule, write: bool) -> list[Image.Image]:
        """The stage's first pictures; a resumed run reads the ones that its first start drew."""
        files = [self.folder / "before" / f"{row:02d}.png" for row in range(len(self.prompt))]
        if all(file.is_file() for file in files):
            return [Image.open(file).convert("RGB") for file in files]
        images = self.sample(module)
        for file, image in zip(files, images, strict=True):
            if write:
                file.parent.mkdir(parents=True, exist_ok=True)
                image.save(file)
        return images


def spread(rows: int, count: int) -> list[int]:
    """`count` rows at equal distances, or all if there are fewer."""
    return list(range(rows)) if count >= rows else [i * rows // count for i in range(count)]


def image_counts(prompt: PromptBatch) -> list[int]:
    """Images of each prompt: an image's slots are one run of the mask, as `</image>` always follows them."""
    before = torch.nn.functional.pad(prompt.image_mask, (1, 0))[:, :-1]
    return (prompt.image_mask & ~before).sum(dim=1).tolist()


def select(prompt: PromptBatch, rows: Sequence[int]) -> PromptBatch:
    """Some prompts of a batch, with their images."""
    counts = image_counts(prompt)
    starts = [sum(counts[:row]) for row in range(len(counts))]
    chosen = [image for row in rows for image in range(starts[row], starts[row] + counts[row])]
    index = torch.tensor(list(rows))
    images = prompt.images[torch.tensor(chosen)] if chosen else None
    return PromptBatch(prompt.ids[index], prompt.image_mask[index], images, prompt.padding[index])


def describe(prompt: PromptBatch, tokenizer: Tokenizer) -> list[tuple[str, list[Image.Image]]]:
    """Text with `<i>` where the images stand, and the images, of each prompt."""
    described, first = [], 0
    for row, count in enumerate(image_counts(prompt)):
        images = [] if prompt.images is None else list(prompt.images[first : first + count].cpu())
        first += count
        described.append((text_of(prompt, row, tokenizer), [to_image(image) for image in images]))
    return described


def text_of(prompt: PromptBatch, row: int, tokenizer: Tokenizer) -> str:
    """The prompt's text, `<i>` for each image."""
    text, pieces = "", []
    special = {tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.image_id}
    for token in prompt.ids[row].tolist():
        if token == tokenizer.image_end_id:
            text += f"{tokenizer.decode(pieces)} <i> "
            pieces = []
        elif token not in special:
            pieces.append(token)
    return (text + tokenizer.decode(pieces)).strip()
