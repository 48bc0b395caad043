"""The same work as the released code does it, written over the same networks (golden README; facts of its waste).

Captions are padded to the longest of the batch, the language model's head is computed and dropped in stages 2 and 3,
all activations are recomputed in the backward pass, the VAE encodes every step's targets, and the null condition has a
pass of its own. Each habit can be left out alone, which gives a lever's own gain. Reentrant checkpoints, which cost the
released code the gradient of CLIP's last block, are not imitated: they change the result, not the time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from kosmosg.models.text_target import TextTarget
from lightning_modules.length_groups import LengthGroups
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.models import Vocabulary
from kosmosg.losses import IGNORED_LABEL, AlignmentVariant, alignment_losses, diffusion_loss
from kosmosg.models.aligner import AlignerDecoder, AlignerEncoder
from kosmosg.models.image_decoder import ImageDecoder
from kosmosg.models.kosmosg import drop_condition
from kosmosg.models.mllm import MLLM
from kosmosg.prompt import PromptBatch
from lightning_modules.instruction_tuning import with_null_row
from lightning_modules.randomness import DiffusionDraws


@contextmanager
def recomputed(*networks: nn.Module) -> Iterator[None]:
    """Run every layer of every layer list as a checkpoint: only its input is kept for the backward pass."""
    layers = [
        layer
        for network in networks
        for module in network.modules()
        if isinstance(module, nn.ModuleList)
        for layer in module
    ]
    for layer in layers:
        layer.forward = partial(checkpoint, type(layer).forward, layer, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@dataclass
class Language:
    """Stage 1."""

    mllm: MLLM
    recompute: bool = True
    counted_logits: bool = False
    """Logits of the positions that the loss counts alone."""

    def __call__(self, prompt: PromptBatch, labels: Tensor) -> Tensor:
        with recomputed(*([self.mllm] if self.recompute else [])):
            hidden = self.mllm(prompt)
            if self.counted_logits:
                hidden, labels = hidden[labels != IGNORED_LABEL], labels[labels != IGNORED_LABEL]
            logits = self.mllm.logits(hidden).float()
            loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL)
            loss.backward()
        return loss.detach()


@dataclass
class Alignment:
    """Stage 2."""

    mllm: MLLM
    aligner: AlignerEncoder
    aligner_decoder: AlignerDecoder
    text_target: TextTarget
    head: bool = True
    recompute: bool = True
    length_groups: int = 1
    variant: AlignmentVariant = "released"

    def __call__(self, prompt: PromptBatch, clip_ids: Tensor) -> Tensor:
        target = self.text_target(clip_ids)
        groups, total = LengthGroups(prompt, self.length_groups), torch.zeros((), device=clip_ids.device)
        with recomputed(*([self.aligner, self.aligner_decoder] if self.recompute else [])):
            for rows, part in zip(groups.rows, groups.parts, strict=True):
                total = total + self._loss(part, target[rows]) * (len(rows) / len(prompt))
            total.backward()
        return total.detach()

    def _loss(self, prompt: PromptBatch, target: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.mllm(prompt)
            if self.head:
                self.mllm.logits(hidden)
        condition = self.aligner(hidden, prompt.padding)
        beyond = None if self.variant == "released" else prompt.padding
        found = self.aligner_decoder(condition, hidden.shape[1], beyond)
        return sum(  # type: ignore[return-value]
            alignment_losses(condition, target, hidden, found, padding=prompt.padding, variant=self.variant)
        )


@dataclass
class Instruction:
    """Stage 3."""

    mllm: MLLM
    aligner: AlignerEncoder
    image_decoder: ImageDecoder
    drop: float
    head: bool = True
    recompute: bool = True
    recompute_unet: bool = True
    moments: Tensor | None = None
    """Of the targets, where they need not be encoded."""
    own_null_pass: bool = True
    length_groups: int = 1

    def __call__(self, prompt: PromptBatch, targets: Tensor, draws: DiffusionDraws) -> Tensor:
        decoder = self.image_decoder
        if self.recompute and self.recompute_unet:
            decoder.unet.enable_gradient_checkpointing()
        else:
            decoder.unet.disable_gradient_checkpointing()
        with recomputed(*([self.mllm, self.aligner] if self.recompute else [])):
            rows = prompt if self.own_null_pass else with_null_row(prompt, Vocabulary.bos_id, Vocabulary.pad_id)
            groups = LengthGroups(rows, self.length_groups)
            condition = groups.join([self._conditions(part) for part in groups.parts])
            null = self._conditions(self.mllm.null_prompt()) if self.own_null_pass else condition[-1:]
            condition = drop_condition(condition[: len(prompt)], null, draws.uniform, self.drop)
            latents = decoder.latents(targets if self.moments is None else self.moments, draws.posterior)
            noisy = decoder.add_noise(latents, draws.noise, draws.timesteps)
            loss = diffusion_loss(decoder(noisy, draws.timesteps, condition), draws.noise)
            loss.backward()
        decoder.unet.disable_gradient_checkpointing()
        return loss.detach()

    def _conditions(self, prompt: PromptBatch) -> Tensor:
        hidden = self.mllm(prompt)
        if self.head:
            with torch.no_grad():  # nothing asks for the logits' gradient
                self.mllm.logits(hidden)
        return self.aligner(hidden, prompt.padding)
