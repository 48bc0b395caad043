"""Stage 2, image decoder alignment (paper section 2.2): AlignerNet learns CLIP's text space from captions alone.

L = w_mse·L_mse + w_rec·L_rec: M(s) hits the CLIP text model's states t (eq. 5) and N finds s again (eq. 6), with s
the MLLM's states of the caption. Trained: M and N. Frozen: MLLM and CLIP text model.

Notable: without padding in the loss (`recipe.variant` masked or paper) a caption's loss does not depend on the batch it
stands in, so that a batch may be computed in groups of like length and frozen states may be kept.

Shapes: `B` batch, `L` tokens, `D` MLLM width, `Q` queries, `C` condition width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kosmosg.losses import AlignmentVariant, alignment_losses
from kosmosg.models.aligner import AlignerDecoder, AlignerEncoder
from kosmosg.models.build import build_aligner, build_aligner_decoder, build_mllm
from kosmosg.models.kosmosg import KosmosG
from kosmosg.models.mllm import MLLM
from kosmosg.models.text_target import TextTarget
from kosmosg.prompt import PromptBatch
from kosmosg.tokenizer import Tokenizer
from lightning_modules.base import StageExperiment, StageModule
from lightning_modules.frozen_cache import FrozenCache, padded, row_keys, unpadded
from lightning_modules.length_groups import LengthGroups, image_rows, take
from lightning_modules.optimizer import OptimizerConfig


@dataclass
class AlignmentRecipe:
    mse_weight: float = 1.0
    """Weight of L_mse, eq. 5."""
    rec_weight: float = 1.0
    """Weight of L_rec, eq. 6; 0 leaves N out of the loss."""
    variant: AlignmentVariant = "released"
    """How the norms of eqs. 5 and 6 are averaged, see kosmosg.losses.alignment_losses; released counts padding."""
    length_groups: int = 1
    """Parts of like length in which a batch is computed; more than 1 needs a variant that does not count padding."""
    cache_megabytes: int = 0
    """Room for the frozen networks' states of captions, for small corpora: so much for CLIP's, and so much for the
    MLLM's where no padding counts, its dropout is off and it is not sharded. 0: none is kept. A resumed run, whose
    cache is empty, agrees with an uninterrupted one to rounding."""
    frozen_dropout: bool = False
    """Dropout in the frozen MLLM. The released code leaves it on; a frozen network without it is the paper's text."""

    def __post_init__(self) -> None:
        for name, least in (("mse_weight", 0), ("rec_weight", 0), ("length_groups", 1), ("cache_megabytes", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"recipe.{name} is {getattr(self, name)}; allowed: {least} or more")
        if self.length_groups > 1 and self.variant == "released":
            raise ValueError(
                f"recipe.length_groups is {self.length_groups}, but recipe.variant=released counts the padding of the "
                "whole batch; allowed: 1, or recipe.variant=masked or paper"
            )
        if self.mse_weight == self.rec_weight == 0:
            raise ValueError("recipe.mse_weight and recipe.rec_weight are both 0; at least one must be above 0")


class AlignmentModule(StageModule):
    """Batches: `prompt` PromptBatch of `<s>caption` and `clip_ids` B×Q.

    Raises:
        ValueError: M's queries or width are not the CLIP text model's length or width.
    """

    def __init__(
        self,
        mllm: MLLM,
        aligner: AlignerEncoder,
        aligner_decoder: AlignerDecoder,
        text_target: TextTarget,
        recipe: AlignmentRecipe,
        optimizer: OptimizerConfig,
        seed: int,
    ):
        super().__init__(optimizer, seed)
        for key, ours, theirs in (
            ("num_queries", aligner.config.num_queries, text_target.length),
            ("width", aligner.config.width, text_target.width),
        ):
            if ours != theirs:
                raise ValueError(
                    f"model.aligner.{key} is {ours}, but the text model of model.image_decoder has {theirs}"
                )
        self.mllm, self.aligner, self.aligner_decoder, self.text_target = mllm, aligner, aligner_decoder, text_target
        self.recipe = recipe
        self.target_cache, self.hidden_cache = FrozenCache(recipe.cache_megabytes), FrozenCache(recipe.cache_megabytes)
        mllm.requires_grad_(False)
        aligner.requires_grad_(True)
        aligner_decoder.requires_grad_(recipe.rec_weight > 0)

    @classmethod
    def build(
        cls, experiment: StageExperiment, tokenizer: Tokenizer, text_target: TextTarget | None = None
    ) -> "AlignmentModule":
        return cls(
            build_mllm(experiment.model, tokenizer, experiment.init_from),
            build_aligner(experiment.model),
            build_aligner_decoder(experiment.model),
            text_target or TextTarget.from_pretrained(experiment.model.image_decoder),
            experiment.recipe,
            experiment.optimizer,
            experiment.seed,
        )

    def frozen_networks(self) -> Sequence[nn.Module]:
        return (self.text_target,) if self.recipe.frozen_dropout else (self.mllm, self.text_target)

    def sharded_networks(self) -> Sequence[nn.Module]:
        return (self.mllm, self.aligner, self.aligner_decoder)

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """`loss`, `mse_loss` (eq. 5) and `rec_loss` (eq. 6) of a batch."""
        target = self.targets(batch.clip_ids)
        groups = LengthGroups(batch.prompt, self.recipe.length_groups)
        means = [
            torch.stack(self.group_losses(part, target[rows])) * (len(rows) / len(batch.prompt))
            for rows, part in zip(groups.rows, groups.parts, strict=True)
        ]
        mse, rec = torch.stack(means).sum(dim=0)
        return {
            "loss": self.recipe.mse_weight * mse + self.recipe.rec_weight * rec,
            "mse_loss": mse,
            "rec_loss": rec,
        }

    def batch_loss(self, batch: Any) -> Tensor:
        return self.losses(batch)["loss"]

    def group_losses(self, prompt: PromptBatch, target: Tensor) -> tuple[Tensor, Tensor]:
        """L_mse and L_rec, means over the captions of `prompt`."""
        variant = self.recipe.variant
        hidden = self.hidden_states(prompt)
        condition = self.aligner(hidden, prompt.padding)
        beyond = None if variant == "released" else prompt.padding
        reconstruction = self.aligner_decoder(condition, hidden.shape[1], beyond)
        return alignment_losses(condition, target, hidden, reconstruction, padding=prompt.padding, variant=variant)

    @torch.no_grad()
    def targets(self, clip_ids: Tensor) -> Tensor:
        """t of eq. 5, B×Q×C."""
        if not self.recipe.cache_megabytes:
            return self.text_target(clip_ids)
        return torch.stack(self.target_cache(row_keys(clip_ids), lambda rows: list(self.text_target(clip_ids[rows]))))

    @torch.no_grad()
    def hidden_states(self, prompt: PromptBatch) -> Tensor:
        """s of eq. 6, B×L×D."""
        kept = self.recipe.variant != "released" and not self.recipe.frozen_dropout
        # Sharded networks are gathered by all processes together, whether or not one has found all its states.
        if not (self.recipe.cache_megabytes and kept and self.device_mesh is None):
            return self.mllm(prompt)
        keys = row_keys(prompt.ids, prompt.padding)

        def compute(rows: list[int]) -> list[Tensor]:
            part = take(prompt, rows, prompt.ids.shape[1], image_rows(prompt))
            return unpadded(self.mllm(part), part.padding)

        return padded(self.hidden_cache(keys, compute), prompt.ids.shape[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.losses(batch)
        self.log_losses("train", losses, len(batch.prompt))
        return losses["loss"]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log_losses("val", self.losses(batch), len(batch.prompt))

    def save_model(self, folder: Path, tokenizer: Tokenizer) -> None:
        """mllm/, aligner/, aligner_decoder/ and tokenizer/."""
        KosmosG(self.mllm, self.aligner).save_pretrained(folder, tokenizer, aligner_decoder=self.aligner_decoder)
