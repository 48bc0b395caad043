"""Stage 2: a step on captions of real lengths, the recipe of configs/alignment.yaml against the released way."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from benchmarks.batches import caption_batch
from benchmarks.comparison import Comparison
from benchmarks.config import BenchmarkConfig, read_config
from benchmarks.models import Parts
from benchmarks.released import Alignment
from kosmosg.batches import AlignmentBatch
from kosmosg.prompt import PromptBatch
from lightning_modules.alignment import AlignmentModule, AlignmentRecipe
from lightning_modules.optimizer import OptimizerConfig

CACHE_MEGABYTES = 4000


def measure(arguments: Sequence[str]) -> dict[str, Any]:
    """See `benchmarks`."""
    return comparison(read_config(arguments)).measure()


def comparison(config: BenchmarkConfig) -> Comparison:
    """Default, released way, levers, scaling over captions and their length."""
    parts = Parts(config)
    networks = parts.mllm(), parts.aligner(), parts.aligner_decoder(), parts.text_target()
    prompt, clip_ids = caption_batch(config)
    groups = config.stage2.length_groups

    def module(**recipe: Any) -> AlignmentModule:
        return AlignmentModule(*networks, AlignmentRecipe(**recipe), OptimizerConfig(), config.seed).train()

    def step(module: AlignmentModule, prompt: PromptBatch, clip_ids: Tensor) -> Tensor:
        loss = module.losses(AlignmentBatch(prompt, clip_ids))["loss"]
        loss.backward()
        return loss.detach()

    default = module(variant="masked", length_groups=groups)
    whole = module(variant="masked")
    cached = module(variant="masked", length_groups=groups, cache_megabytes=CACHE_MEGABYTES)

    def released(**changes: Any):
        way = Alignment(*networks, **changes)
        return lambda: way(prompt, clip_ids)

    def scaled(captions: int, length: int | None = None):
        batch = caption_batch(config, captions, length)
        return lambda: step(default, *batch)

    lengths = (~prompt.padding).sum(dim=1)
    one_by_one, together = float(step(whole, prompt, clip_ids)), float(step(default, prompt, clip_ids))
    captions, base = config.stage2.captions, max(config.stage2.lengths.longest // 8, 2)
    return Comparison(
        name="stage2",
        config=config,
        ours=lambda: step(default, prompt, clip_ids),
        theirs=released(),
        items=len(prompt),
        unit="captions",
        levers={
            "no language-model head": released(head=False),
            "no recompute": released(recompute=False),
            f"padding out of L_rec, {groups} length groups": released(variant="masked", length_groups=groups),
            "the default with frozen states cached (repeated captions)": lambda: step(cached, prompt, clip_ids),
        },
        axes={
            "captions": {count: lambda count=count: scaled(count) for count in (captions // 2, captions, 2 * captions)},
            "tokens of every caption": {
                size: lambda size=size: scaled(captions, size - 1) for size in (base, 2 * base, 4 * base)
            },
        },
        facts={
            "caption lengths": f"log-normal, median {config.stage2.lengths.median}, sigma "
            f"{config.stage2.lengths.sigma}, here mean {lengths.float().mean():.1f} and longest "
            f"{int(lengths.max())} with <s>",
            "loss in groups against whole, relative difference": f"{abs(together / one_by_one - 1):.1e}",
        },
    )
