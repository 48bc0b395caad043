"""Stage 2, image decoder alignment (paper section 2.2): AlignerNet learns CLIP's text space from captions alone.

L = w_mse·L_mse + w_rec·L_rec: M(s) hits the CLIP text model's states t (eq. 5) and N finds s again (eq. 6), with s
the MLLM's states of the caption. Trained: M and N. Frozen: MLLM and CLIP text model.

Shapes: `B` batch, `L` tokens, `D` MLLM width, `Q` queries, `C` condition width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kosmosg.losses import alignment_losses
from kosmosg.models.aligner import AlignerDecoder, AlignerEncoder
from kosmosg.models.build import build_aligner, build_aligner_decoder, build_mllm
from kosmosg.models.kosmosg import KosmosG
from kosmosg.models.mllm import MLLM
from kosmosg.models.text_target import TextTarget
from kosmosg.tokenizer import Tokenizer
from lightning_modules.base import StageExperiment, StageModule
from lightning_modules.optimizer import OptimizerConfig


@dataclass
class AlignmentRecipe:
    mse_weight: float = 1.0
    """Weight of L_mse, eq. 5."""
    rec_weight: float = 1.0
    """Weight of L_rec, eq. 6; 0 leaves N out of the loss."""
    variant: Literal["released", "paper"] = "released"
    """How the norms of eqs. 5 and 6 are averaged, see kosmosg.losses.alignment_losses."""
    frozen_dropout: bool = False
    """Dropout in the frozen MLLM. The released code leaves it on; a frozen network without it is the paper's text."""

    def __post_init__(self) -> None:
        for name in ("mse_weight", "rec_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"recipe.{name} is {getattr(self, name)}; allowed: 0 or more")
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
        mllm.requires_grad_(False)
        aligner.requires_grad_(True)
        aligner_decoder.requires_grad_(recipe.rec_weight > 0)

    @classmethod
    def build(cls, experiment: StageExperiment, tokenizer: Tokenizer) -> "AlignmentModule":
        return cls(
            build_mllm(experiment.model, tokenizer, experiment.init_from),
            build_aligner(experiment.model),
            build_aligner_decoder(experiment.model),
            TextTarget.from_pretrained(experiment.model.image_decoder),
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
        with torch.no_grad():
            hidden = self.mllm(batch.prompt)
            target = self.text_target(batch.clip_ids)
        condition = self.aligner(hidden, batch.prompt.padding)
        reconstruction = self.aligner_decoder(condition, hidden.shape[1])
        mse, rec = alignment_losses(
            condition, target, hidden, reconstruction, padding=batch.prompt.padding, variant=self.recipe.variant
        )
        return {
            "loss": self.recipe.mse_weight * mse + self.recipe.rec_weight * rec,
            "mse_loss": mse,
            "rec_loss": rec,
        }

    def batch_loss(self, batch: Any) -> Tensor:
        return self.losses(batch)["loss"]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.losses(batch)
        self.log_losses("train", losses, len(batch.prompt))
        return losses["loss"]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log_losses("val", self.losses(batch), len(batch.prompt))

    def save_model(self, folder: Path, tokenizer: Tokenizer) -> None:
        """mllm/, aligner/, aligner_decoder/ and tokenizer/."""
        KosmosG(self.mllm, self.aligner).save_pretrained(folder, tokenizer, aligner_decoder=self.aligner_decoder)
