"""A released checkpoint: which stage wrote it, its header, and its parts' weights."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from kosmosg.conversion.errors import ConversionError
from kosmosg.conversion.reader import read_checkpoint
from kosmosg.conversion.sizes import Header
from kosmosg.conversion.state import rename, require_tied
from kosmosg.conversion.weights import Weights

STAGES = {"stage1": "stage 1", "stage2": "stage 2", "final": "final"}
# Names under which a part that is missing would be found.
PREFIXES = {
    "mllm": "gpt_model.*, img_model.*, img_connector.*",
    "aligner": "aligner.encoder_proj.*, aligner.encoder_query, aligner.encoder.*",
    "unet": "diffusion_unet.unet.*",
    "vae": "vae.vae.*",
}


@dataclass(frozen=True)
class Checkpoint:
    """Weights by part, and names that are known and not needed."""

    path: Path
    header: Header
    parts: Mapping[str, Weights]
    left_out: list[str]

    @classmethod
    def read(cls, path: str | Path) -> "Checkpoint":
        """Learn everything but the values.

        Raises:
            FileNotFoundError: no such file.
            ConversionError: see `read_checkpoint`, `convert_state`.
        """
        path = Path(path)
        checkpoint = read_checkpoint(path)
        try:
            converted = rename(checkpoint["model"])
            require_tied(checkpoint["model"])
        except ConversionError as error:
            raise ConversionError(f"'{path}': {error}") from error
        parts = {part: Weights.of(path, partial(open_part, path, part)) for part in converted.parts}
        return cls(path, Header.of(checkpoint), parts, sorted(converted.unneeded))

    @property
    def stage(self) -> str:
        """stage1, stage2 or final."""
        return stage_of(self.parts)

    def require_whole(self, decoder: bool) -> None:
        """Refuse parts that no stage writes together.

        Args:
            decoder: whether a U-Net or VAE that is missing comes from elsewhere.

        Raises:
            ConversionError: names the part that is missing.
        """
        needed = {"mllm"} if set(self.parts) == {"mllm"} else {"mllm", "aligner"}
        if not decoder and {"unet", "vae"} & set(self.parts):
            needed |= {"unet", "vae"}
        for part in sorted(needed - set(self.parts)):
            give = "; give --decoder, which has one" if part in ("unet", "vae") else ""
            raise ConversionError(
                f"'{self.path}' lacks the part {part} ({PREFIXES[part]}); it holds {', '.join(self.parts)}{give}."
            )
        if "aligner_decoder" in self.parts and {"unet", "vae"} & set(self.parts):
            raise ConversionError(
                f"'{self.path}' holds aligner_decoder, which stage 2 writes, and a U-Net or VAE, which stage 3 writes; "
                "no released checkpoint has both."
            )


def stage_of(parts: Mapping[str, object]) -> str:
    """The stage after which a model has `parts`."""
    if "aligner_decoder" in parts:
        return "stage2"
    return "final" if "aligner" in parts else "stage1"


def open_part(path: Path, part: str) -> dict[str, Tensor]:
    """One part's tensors, mapped anew."""
    return rename(read_checkpoint(path)["model"]).parts[part]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
