"""Stage 3: a step on constructed, edit and caption prompts, the project's way against the released one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.batches import instruction_batch
from benchmarks.comparison import Comparison
from benchmarks.config import BenchmarkConfig, read_config
from benchmarks.models import Parts
from benchmarks.released import Instruction
from kosmosg.prompt import PromptBatch
from lightning_modules.instruction_tuning import InstructionTuningModule, InstructionTuningRecipe
from lightning_modules.optimizer import OptimizerConfig


def measure(arguments: Sequence[str]) -> dict[str, Any]:
    """See `benchmarks`."""
    return comparison(read_config(arguments)).measure()


def comparison(config: BenchmarkConfig) -> Comparison:
    """Default (moments from disk, length groups, no recompute), released way, levers, scaling."""
    parts = Parts(config)
    mllm, aligner, decoder = parts.mllm(), parts.aligner(), parts.image_decoder()
    prompt, targets = instruction_batch(config)
    moments, groups = decoder.moments(targets), config.stage3.length_groups

    def module(**recipe: Any) -> InstructionTuningModule:
        made = InstructionTuningRecipe(**recipe)
        return InstructionTuningModule(mllm, aligner, decoder, made, OptimizerConfig(), config.seed).train()

    default, whole = module(length_groups=groups), module()
    drop = default.recipe.condition_drop

    def draws(targets: Tensor):
        return default._draws("train", range(len(targets)), targets).to(config.torch_device())

    def step(module: InstructionTuningModule, prompt: PromptBatch, targets: Tensor) -> Tensor:
        loss = module.sample_losses(prompt, targets, draws(targets), drop).mean()
        loss.backward()
        return loss.detach()

    def released(**changes: Any):
        way = Instruction(mllm, aligner, decoder, drop, **changes)
        return lambda: way(prompt, targets, draws(targets))

    def scaled(samples: int, images: int | None = None):
        batch = instruction_batch(config, samples, images)
        encoded = decoder.moments(batch[1])
        return lambda: step(default, batch[0], encoded)

    lengths = (~prompt.padding).sum(dim=1)
    together, one_by_one = float(step(default, prompt, moments)), float(step(whole, prompt, targets))
    difference = f"{abs(together / one_by_one - 1):.1e}"
    with torch.no_grad():
        conditions = default.conditions(prompt), whole.conditions(prompt)
    apart = float((conditions[0] - conditions[1]).abs().max() / conditions[1].abs().max())
    theirs, samples = float(released()()), config.stage3.samples
    return Comparison(
        name="stage3",
        config=config,
        ours=lambda: step(default, prompt, moments),
        theirs=released(),
        items=len(prompt),
        unit="images",
        levers={
            "VAE's moments from disk": released(moments=moments),
            "no recompute": released(recompute=False),
            "no recompute of the U-Net alone": released(recompute_unet=False),
            f"{groups} length groups": released(length_groups=groups),
            "no language-model head": released(head=False),
            "null condition as a row of the batch": released(own_null_pass=False),
            "the default with images encoded in every step": lambda: step(default, prompt, targets),
        },
        axes={
            "samples": {count: lambda count=count: scaled(count) for count in (samples // 2, samples, 2 * samples)},
            "images of every prompt": {count: lambda count=count: scaled(samples, count) for count in (1, 2, 4)},
        },
        facts={
            "prompts": "constructed : edit : caption = 2 : 2 : 1; constructed with 1, 2, 3, 4 images in shares "
            f"{config.stage3.entities}; tokens here: mean {lengths.float().mean():.0f}, longest {int(lengths.max())}",
            "loss in groups from moments against whole from pixels, relative difference": difference,
            "loss against the released way's, relative difference": f"{abs(together / theirs - 1):.1e}",
            "conditions in groups against whole, largest difference by largest value": f"{apart:.1e}",
        },
    )
