"""How long texts are: in the model's pieces, in CLIP's tokens, or without a tokenizer in words."""

from functools import cached_property
from pathlib import Path
from typing import Any

from datamodules.errors import DataError

FILES = {"sentencepiece.bpe.model": "pieces", "vocab.json": "CLIP tokens", "tokenizer.json": "CLIP tokens"}
"""By which a tokenizer is known: ours, and CLIP's as older and newer versions of transformers write it."""


class TokenCounter:
    """Counts tokens without start and end. Sent to worker processes: the tokenizer is read where it is used.

    Args:
        folder: a tokenizer of ours or a model folder that holds one, or a CLIP tokenizer; None counts words.

    Raises:
        DataError: the folder holds neither.
    """

    def __init__(self, folder: str | None):
        self.folder, self.unit = folder, "words"
        if folder is None:
            return
        inside = Path(folder) / "tokenizer"
        self.folder = str(inside) if inside.is_dir() else folder
        for name, unit in FILES.items():
            if (Path(self.folder) / name).is_file():
                self.unit = unit
                return
        raise DataError(f"'{folder}' holds no tokenizer, ours or CLIP's; looked for {', '.join(FILES)}.")

    def __call__(self, text: str) -> int:
        """Tokens of a text."""
        if self.unit == "words":
            return len(text.split())
        if self.unit == "pieces":
            return len(self._tokenizer.encode(text))
        return len(self._tokenizer(text, add_special_tokens=False).input_ids)

    @cached_property
    def _tokenizer(self) -> Any:
        assert self.folder is not None
        if self.unit == "pieces":
            from kosmosg.tokenizer import Tokenizer

            return Tokenizer.from_pretrained(self.folder)
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(self.folder)

    def __getstate__(self) -> dict:
        return {"folder": self.folder, "unit": self.unit}
