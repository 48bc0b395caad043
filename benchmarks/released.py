"""Compare each stage's training step with the released code's implementation of it, with the same networks.

The released code pads to the longest row, computes the language model's logits in stages 2 and 3 without using them,
recomputes all layers in the backward pass, encodes targets in every step, and computes the null condition in a separate
pass (docs/released-code.md). Further variants leave out one of these at a time. For stage 1, which was not released,
the released variant has one document per row and logits at all positions. Reentrant checkpointing, which loses the
gradient of CLIP's last block, is not imitated: it changes the result, not the time. Dropout is off, so that losses are
equal, except that packed documents read the ones before them unless separated, and that L_rec without padding differs.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.batches import Writer, next_words
from benchmarks.measure import Limit, peak_bytes, ratio, time_alternately
from benchmarks.setting import Setting, backward
from kosmosg.batches import LanguageModellingBatch, MicroBatch
from kosmosg.condition import Condition
from kosmosg.losses import IGNORED_LABEL
from kosmosg.prompt import PromptBatch
from lightning_modules.base import PromptShape
from lightning_modules.parallelize import apply_activation_checkpointing, denoisers, layers

OURS, RELEASED = "as shipped", "released way"
Variant = Callable[[], Tensor]


def compare_stage(setting: Setting, stage: str, limit: Limit) -> Iterator[dict[str, Any]]:
    """Measure all variants of a stage's step, alternately, with speed-ups over the released one."""
    config, experiment = setting.config, setting.experiment(stage)
    experiment.model.mllm.dropout = 0.0
    module = setting.build(experiment)
    variants = VARIANTS[stage](Steps(module, experiment.trainer.precision), Writer(setting), experiment)
    losses = {name: float(step()) for name, step in variants.items()}
    seconds = time_alternately(variants, config.repetitions, config.warmup, setting.device, limit, config.clock)
    memory = {name: peak_bytes(step, module) for name, step in variants.items()}
    for name in variants:
        yield {
            "part": stage,
            "variant": name,
            "micro_batch": experiment.data.micro_batch_size,
            "seconds": median(seconds[name]),
            "ratio": ratio(seconds[RELEASED], seconds[name]),
            "peak_bytes": memory[name],
            "loss": losses[name],
        }


class Steps:
    """Makes variants of a stage's training step.

    Args:
        precision: the precision, as Lightning names it.
    """

    def __init__(self, module: Any, precision: str):
        self.module, self.precision = module, precision

    def __call__(
        self,
        batch: MicroBatch,
        *,
        recompute: bool = False,
        head: bool = False,
        patches: dict[str, Any] | None = None,
        **recipe: Any,
    ) -> Variant:
        """A step on `batch`.

        Args:
            recompute: recompute all layers in the backward pass.
            head: compute the language model's logits without using them.
            patches: methods of the module to replace.
            recipe: keys of the stage's recipe to replace.
        """
        module = self.module
        changes = {"recipe": replace(module.recipe, **recipe), **(patches or {})}

        def step() -> Tensor:
            with ExitStack() as stack:
                for name, value in changes.items():
                    stack.enter_context(mock.patch.object(module, name, value))
                if recompute:
                    stack.enter_context(recomputed(module))
                if head:
                    handle = module.mllm.register_forward_hook(compute_head)
                    stack.callback(handle.remove)
                loss = backward(module, batch, self.precision)
                module.zero_grad()
                return loss

        return step


@contextmanager
def recomputed(module: nn.Module) -> Iterator[None]:
    """Apply full activation checkpointing temporarily."""
    apply_activation_checkpointing(module, "full")
    try:
        yield
    finally:
        for layer in layers(module):
            vars(layer).pop("forward", None)
        for denoiser in denoisers(module):
            denoiser.disable_gradient_checkpointing()


@torch.no_grad()
def compute_head(mllm: Any, _: Any, hidden: Tensor) -> None:
    """Forward hook that computes the logits without using them."""
    mllm.logits(hidden)


def language_modelling(steps: Steps, writer: Writer, experiment: Any) -> dict[str, Variant]:
    """Variants of stage 1."""
    prompts = writer.documents(experiment.data.micro_batch_size, experiment.data.sequence_length)
    packed, alone = (LanguageModellingBatch(prompt=prompt, labels=next_words(prompt)) for prompt in prompts)

    def all_logits(prompt: PromptBatch, labels: Tensor) -> Tensor:
        logits = steps.module.mllm.logits(steps.module.mllm(prompt)).float()
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL)

    patches = {"loss": all_logits}
    return {
        OURS: steps(packed),
        RELEASED: steps(alone, recompute=True, patches=patches),
        "released, but packed": steps(packed, recompute=True, patches=patches),
        "released, but logits of labels only": steps(alone, recompute=True, loss_chunk=None),
        "released, but not recomputed": steps(alone, patches=patches),
        "as shipped, but recomputed": steps(packed, recompute=True),
        "as shipped, documents kept apart": steps(packed, separate_documents=True),
    }


def alignment(steps: Steps, writer: Writer, experiment: Any) -> dict[str, Variant]:
    """Variants of stage 2."""
    rows, buckets = experiment.data.micro_batch_size, experiment.recipe.length_buckets
    fake = steps.module.fake_batch(rows, PromptShape(1, 0), experiment.model.image_size)
    batch = replace(fake, prompt=writer.captions(rows))
    released: dict[str, Any] = {"variant": "released", "length_buckets": 1}
    masked = {"variant": experiment.recipe.variant, "length_buckets": buckets}
    return {
        OURS: steps(batch),
        RELEASED: steps(batch, head=True, recompute=True, **released),
        "released, but without the head": steps(batch, recompute=True, **released),
        "released, but not recomputed": steps(batch, head=True, **released),
        f"released, but padding out of L_rec, {buckets} buckets": steps(batch, head=True, recompute=True, **masked),
    }


def instruction_tuning(steps: Steps, writer: Writer, experiment: Any) -> dict[str, Variant]:
    """Variants of stage 3; the shipped one uses cached latents (data.cached_latents)."""
    module, rows = steps.module, experiment.data.micro_batch_size
    fake = module.fake_batch(rows, PromptShape(1, 0), experiment.model.image_size)
    encoded = replace(fake, prompt=writer.instructions(rows))
    with torch.autocast(module.device.type, torch.bfloat16, enabled=steps.precision == "bf16-mixed"):
        cached = replace(encoded, targets=module.image_decoder.moments(encoded.targets).float())

    def own_null_pass(prompt: PromptBatch) -> tuple[Condition, Condition]:
        null = module.mllm.unconditional_prompt().to(prompt.ids.device)
        first, second = (module.aligner(*module.mllm.hidden_states(part)) for part in (prompt, null))
        return first, second

    as_released: dict[str, Any] = {"head": True, "recompute": True, "length_buckets": 1}
    null: dict[str, Any] = {"patches": {"conditions": own_null_pass}}
    buckets = module.recipe.length_buckets
    return {
        OURS: steps(cached),
        RELEASED: steps(encoded, **as_released, **null),
        "released, but with cached latents": steps(cached, **as_released, **null),
        "released, but not recomputed": steps(encoded, **{**as_released, "recompute": False}, **null),
        "released, but without the head": steps(encoded, **{**as_released, "head": False}, **null),
        "released, but the null condition a row of the batch": steps(encoded, **as_released),
        f"released, but {buckets} buckets, null a row": steps(encoded, **{**as_released, "length_buckets": buckets}),
        "as shipped, images encoded in every step": steps(encoded),
    }


VARIANTS = {
    "language_modelling": language_modelling,
    "alignment": alignment,
    "instruction_tuning": instruction_tuning,
}
