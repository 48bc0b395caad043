"""KosmosG: MLLM and AlignerNet, which turn a prompt into the image decoder's condition (paper Fig. 2).

Shapes: `B` batch, `Q` condition tokens, `C` condition width.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from kosmosg.condition import Condition
from kosmosg.models.aligner import Aligner, AlignerDecoder, load_aligner
from kosmosg.models.mllm import MLLM, MultimodalLM
from kosmosg.models.storage import CONFIG_FILE, find_model, load_part, save_model, saved_class
from kosmosg.models.vision_language_model import LanguageProcessor, VisionLanguageModel
from kosmosg.prompt import PromptBatch
from kosmosg.tokenizer import Tokenizer


class KosmosG(nn.Module):
    """C = M(MLLM(prompt)): the condition of a prompt.

    Raises:
        ValueError: the aligner's input width is not the MLLM's width.
    """

    mllm: MultimodalLM
    aligner: Aligner

    def __init__(self, mllm: MultimodalLM, aligner: Aligner):
        super().__init__()
        if aligner.config.input_width != mllm.width:
            raise ValueError(
                f"the aligner reads states of width {aligner.config.input_width} but the MLLM's are "
                f"{mllm.width} wide; they belong to different models."
            )
        self.mllm, self.aligner = mllm, aligner

    def condition(self, batch: PromptBatch) -> Condition:
        """Return the condition of each prompt, states B×Q×C."""
        return self.aligner(*self.mllm.hidden_states(batch))

    def null_condition(self) -> Condition:
        """Return the condition of the unconditional prompt, which classifier-free guidance steers away from; one row.

        It is computed with gradients from the current weights; recompute it when they change.
        """
        return self.condition(self.mllm.unconditional_prompt().to(self.mllm.device))

    def forward(self, batch: PromptBatch) -> Condition:
        """See `condition`."""
        return self.condition(batch)

    def save_pretrained(
        self,
        folder: str | Path,
        tokenizer: Tokenizer | LanguageProcessor,
        aligner_decoder: AlignerDecoder | None = None,
    ) -> None:
        """Write mllm/, aligner/ and tokenizer/, and after stage 2 aligner_decoder/."""
        save_model(folder, tokenizer, mllm=self.mllm, aligner=self.aligner, aligner_decoder=aligner_decoder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype = torch.float32) -> "KosmosG":
        """Load a model folder, or the model of a run folder, in eval mode.

        Raises:
            FileNotFoundError: there is no model.
            ValueError: the weights do not match the configuration.
        """
        folder = find_model(folder)
        return cls(load_mllm(folder / "mllm", torch_dtype), load_aligner(folder / "aligner", torch_dtype))


def load_mllm(folder: Path, torch_dtype: torch.dtype = torch.float32) -> MLLM | VisionLanguageModel:
    """Load the multimodal language model in `folder`, of the class in its configuration; errors as `load_part`."""
    kind: Any = VisionLanguageModel if saved_class(folder) == VisionLanguageModel.__name__ else MLLM
    return load_part(kind, folder, torch_dtype)


def load_tokenizer(folder: Path) -> Tokenizer | LanguageProcessor:
    """Load the tokenizer/ folder that `save_pretrained` wrote."""
    return (LanguageProcessor if (folder / CONFIG_FILE).is_file() else Tokenizer).from_pretrained(folder)
