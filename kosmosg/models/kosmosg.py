"""MLLM and AlignerNet together: a prompt becomes the condition of Stable Diffusion (paper Fig. 2).

Shapes: `B` batch, `Q` condition tokens, `C` condition width.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from kosmosg.models.aligner import Aligner, AlignerDecoder, load_aligner
from kosmosg.models.mllm import MLLM
from kosmosg.models.storage import find_model, load_part, save_model
from kosmosg.prompt import PromptBatch
from kosmosg.tokenizer import Tokenizer


class KosmosG(nn.Module):
    """C = M(MLLM(prompt)).

    Raises:
        ValueError: the aligner reads another width than the MLLM's.
    """

    def __init__(self, mllm: MLLM, aligner: Aligner):
        super().__init__()
        if aligner.config.input_width != mllm.config.width:
            raise ValueError(
                f"the aligner reads states of width {aligner.config.input_width} but the MLLM's are "
                f"{mllm.config.width} wide; they come from different models."
            )
        self.mllm, self.aligner = mllm, aligner

    def condition(self, batch: PromptBatch, features: Tensor | None = None) -> Tensor:
        """Prompts → condition B×Q×C; `features` as in `MLLM.forward`."""
        return self.aligner(self.mllm(batch, features), batch.padding)

    def null_condition(self) -> Tensor:
        """The condition of `<s>` alone, 1×Q×C: what classifier-free guidance steers away from.

        It carries gradients, and follows the weights: recompute it when they change.
        """
        return self.condition(self.mllm.null_prompt())

    def forward(self, batch: PromptBatch) -> Tensor:
        """See `condition`."""
        return self.condition(batch)

    def save_pretrained(
        self, folder: str | Path, tokenizer: Tokenizer, aligner_decoder: AlignerDecoder | None = None
    ) -> None:
        """Write mllm/, aligner/ and tokenizer/, and aligner_decoder/ after stage 2."""
        save_model(folder, tokenizer, mllm=self.mllm, aligner=self.aligner, aligner_decoder=aligner_decoder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype = torch.float32) -> "KosmosG":
        """Read a model folder or a run folder that holds one; the model is in eval mode.

        Raises:
            FileNotFoundError: no model there.
            ValueError: weights that do not fit the recorded sizes.
        """
        folder = find_model(folder)
        return cls(
            load_part(MLLM, folder / "mllm", torch_dtype),
            load_aligner(folder / "aligner", torch_dtype),
        )


def drop_condition(condition: Tensor, null_condition: Tensor, uniform: Tensor, probability: float) -> Tensor:
    """Replace whole conditions by the null condition where `uniform < probability` (golden README, "Stage-3 loss").

    Args:
        condition: B×Q×C.
        null_condition: 1×Q×C.
        uniform: one draw from [0, 1) for each sample, B.
    """
    return torch.where((uniform < probability)[:, None, None], null_condition, condition)
