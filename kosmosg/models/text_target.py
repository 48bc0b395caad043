"""The frozen CLIP text model whose states AlignerNet learns to hit: t of eq. 5.

Notable: no attention mask. Padding is the end token and counts, as in Stable Diffusion itself.

Shapes: `B` batch, `Q` the text model's length (77), `C` its width (768).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer


class TextTarget(nn.Module):
    """Stable Diffusion's text encoder and tokenizer, frozen and always in eval mode."""

    def __init__(self, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer | None):
        super().__init__()
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.requires_grad_(False)
        self.train(False)

    @classmethod
    def from_pretrained(cls, stable_diffusion: str | Path, torch_dtype: torch.dtype = torch.float32) -> "TextTarget":
        """Read text_encoder/ and tokenizer/ of a Stable Diffusion folder or hub id."""
        return cls(
            CLIPTextModel.from_pretrained(stable_diffusion, subfolder="text_encoder", dtype=torch_dtype),
            CLIPTokenizer.from_pretrained(stable_diffusion, subfolder="tokenizer"),
        )

    def train(self, mode: bool = True) -> "TextTarget":
        """Stay in eval mode whatever the surrounding module does."""
        return super().train(False)

    @property
    def length(self) -> int:
        """`Q`."""
        return self.text_encoder.config.max_position_embeddings

    @property
    def width(self) -> int:
        """`C`."""
        return self.text_encoder.config.hidden_size

    def tokenize(self, texts: Sequence[str], *, truncation: bool = True) -> Tensor:
        """Captions → ids B×Q; longer ones are cut unless `truncation` is False.

        Raises:
            ValueError: a caption is too long and may not be cut.
        """
        ids = self.tokenizer(list(texts), padding="max_length", truncation=truncation, max_length=self.length).input_ids
        for text, row in zip(texts, ids, strict=True):
            if len(row) > self.length:
                raise ValueError(f"the caption {text!r} has {len(row)} CLIP tokens; at most {self.length} are allowed.")
        return torch.tensor(ids)

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        """Ids B×Q → the last hidden state after its final norm, B×Q×C."""
        return self.text_encoder(input_ids=ids).last_hidden_state
