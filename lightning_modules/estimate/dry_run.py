"""A stage at full size without memory, and what one forward and backward pass of it costs; no weights are read.

The stage's own module is built at its full size without memory, and its own loss runs forward and backward over shapes
(step_cost.py). Sizes of Stable Diffusion come from its folder, or are the published ones of v1.5.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from kosmosg.conversion import stable_diffusion_v1_5
from kosmosg.models.image_decoder import ImageDecoder
from kosmosg.models.model_config import ModelConfig
from kosmosg.models.text_target import TextTarget
from kosmosg.prompt import PromptBatch
from kosmosg.tokenizer import Tokenizer
from lightning_modules.alignment import AlignmentModule
from lightning_modules.base import StageModule
from lightning_modules.estimate.hardware import HardwareConfig
from lightning_modules.estimate.step_cost import StepCost, measure, without_values
from lightning_modules.instruction_tuning import InstructionTuningModule
from lightning_modules.language_modelling import LanguageModellingModule
from lightning_modules.randomness import DiffusionDraws
from lightning_modules.scale.recompute import apply_recompute

RELEASED_VOCABULARY = 64_007
CAPTION_TOKENS, PROMPT_TOKENS, PROMPT_IMAGES, PACKED_IMAGES = 75, 160, 2, 11
WITHOUT_VALUES = {"length_groups": 1, "cache_megabytes": 0}
SD_CONFIGS = {
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}


@dataclass(frozen=True)
class Vocabulary:
    """As much of a tokenizer as building a model needs."""

    size: int
    pad_id: int = 1
    bos_id: int = 0

    def __len__(self) -> int:
        return self.size


@dataclass(frozen=True)
class Sized:
    """A stage's module without weights, what its pass costs, and the prompts it was counted with."""

    module: StageModule
    cost: StepCost
    hardware: HardwareConfig
    vocabulary: int


def size_up(experiment: Any) -> Sized:
    """Build the stage of `experiment` without memory and count a pass.

    Raises:
        ValueError: sizes that do not fit, or a Stable Diffusion of which only a name is known.
    """
    words = count_words(Path(experiment.model.tokenizer))
    # Rows are of one length here, so groups of like length change nothing, and there are no values to be kept.
    without = {key: value for key, value in WITHOUT_VALUES.items() if hasattr(experiment.recipe, key)}
    recipe = replace(experiment.recipe, **without)
    fresh = replace(experiment, init_from=None, recipe=recipe, model=replace(experiment.model, vision_weights=None))
    with without_values(), torch.random.fork_rng(devices=[]):
        module = BUILDERS[experiment.module](fresh, Vocabulary(words)).train()
        apply_recompute(module, experiment.trainer.recompute)
        hardware, loss = LOSSES[experiment.module](module, experiment)
        one, two = (measure(module, lambda rows=rows: loss(rows), experiment.trainer.precision) for rows in (1, 2))
    return Sized(module, StepCost(one, two), hardware, words)


def count_words(tokenizer: Path) -> int:
    """Ids of the tokenizer in the folder, or of the released one where there is none yet."""
    return len(Tokenizer.from_pretrained(tokenizer)) if tokenizer.is_dir() else RELEASED_VOCABULARY


def stable_diffusion_sizes(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The configurations of `model.image_decoder`'s parts.

    Raises:
        ValueError: neither a folder nor Stable Diffusion v1.5.
    """
    folder = Path(config.image_decoder)
    if folder.is_dir():
        files = {name: folder / file for name, file in SD_CONFIGS.items()}
        return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    if config.image_decoder == stable_diffusion_v1_5.HUB_ID:
        return dict(stable_diffusion_v1_5.CONFIGS)
    raise ValueError(
        f"model.image_decoder is '{config.image_decoder}', whose sizes a dry run does not know; allowed: a folder, or "
        f"'{stable_diffusion_v1_5.HUB_ID}'"
    )


def _language_modelling(experiment: Any, words: Any) -> StageModule:
    return LanguageModellingModule.build(experiment, words)


def _alignment(experiment: Any, words: Any) -> StageModule:
    text = CLIPTextModel(CLIPTextConfig(**stable_diffusion_sizes(experiment.model)["text_encoder"]))
    return AlignmentModule.build(experiment, words, TextTarget(text, None))


def _instruction_tuning(experiment: Any, words: Any) -> StageModule:
    sizes = stable_diffusion_sizes(experiment.model)
    unet, vae = UNet2DConditionModel.from_config(sizes["unet"]), AutoencoderKL.from_config(sizes["vae"])
    scheduler = DDPMScheduler.from_config(sizes["scheduler"])
    return InstructionTuningModule.build(experiment, words, ImageDecoder(unet, vae, scheduler))


Loss = Callable[[int], Tensor]


def _language_modelling_loss(module: Any, experiment: Any) -> tuple[HardwareConfig, Loss]:
    shape = experiment.hardware.with_defaults(experiment.data.sequence_length, PACKED_IMAGES)

    def loss(rows: int) -> Tensor:
        prompt = prompts(module, rows, shape)
        return module.loss(prompt, torch.zeros_like(prompt.ids))

    return shape, loss


def _alignment_loss(module: Any, experiment: Any) -> tuple[HardwareConfig, Loss]:
    shape = experiment.hardware.with_defaults(CAPTION_TOKENS, 0)

    def loss(rows: int) -> Tensor:
        clip_ids = torch.zeros(rows, module.text_target.length, dtype=torch.int64)
        return module.batch_loss(Rows(prompts(module, rows, shape), clip_ids))

    return shape, loss


def _instruction_tuning_loss(module: Any, experiment: Any) -> tuple[HardwareConfig, Loss]:
    shape = experiment.hardware.with_defaults(PROMPT_TOKENS, PROMPT_IMAGES)
    side = experiment.model.image_size
    vae = module.image_decoder.vae.config

    def loss(rows: int) -> Tensor:
        draws = rows * module.recipe.draws_per_sample
        latent = side // 2 ** (len(vae.block_out_channels) - 1)
        noise = torch.empty(draws, vae.latent_channels, latent, latent)
        drawn = DiffusionDraws(torch.zeros(draws, dtype=torch.int64), noise, noise.clone(), torch.empty(draws))
        targets = torch.empty(rows, 3, side, side)
        return module.sample_losses(prompts(module, rows, shape), targets, drawn, drop=0.1).mean()

    return shape, loss


@dataclass(frozen=True)
class Rows:
    """As much of a batch of stage 2 as its losses read."""

    prompt: PromptBatch
    clip_ids: Tensor


def prompts(module: Any, rows: int, shape: HardwareConfig) -> PromptBatch:
    """Prompts of the assumed length and number of images, inside `without_values`."""
    assert shape.prompt_tokens is not None and shape.images_per_row is not None
    size = module.mllm.vision.image_size
    ids = torch.zeros(rows, shape.prompt_tokens, dtype=torch.int64)
    nowhere = torch.zeros_like(ids, dtype=torch.bool)
    images = torch.empty(rows * shape.images_per_row, 3, size, size) if shape.images_per_row else None
    return PromptBatch(ids=ids, image_mask=nowhere, images=images, padding=nowhere)


BUILDERS = {
    LanguageModellingModule: _language_modelling,
    AlignmentModule: _alignment,
    InstructionTuningModule: _instruction_tuning,
}
LOSSES = {
    LanguageModellingModule: _language_modelling_loss,
    AlignmentModule: _alignment_loss,
    InstructionTuningModule: _instruction_tuning_loss,
}
