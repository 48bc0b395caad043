"""Configurations and weights of the image decoder in a conversion: a Stable Diffusion folder, a hub id, or v1.5."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME, SchedulerMixin

from kosmosg.conversion.reader import ConversionError, find_folder, read_json
from kosmosg.conversion.weights import Weights, folder_weights
from kosmosg.models.published import CONFIGS, STABLE_DIFFUSION_1_5
from kosmosg.models.storage import CONFIG_FILE
from kosmosg.sampling import build_scheduler

SUBFOLDERS = ("unet", "vae", "text_encoder")
NEEDED = ("unet", "vae", "scheduler")
DOWNLOADED = [
    *(f"{part}/{CONFIG_FILE}" for part in SUBFOLDERS),
    *(f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")),
    f"scheduler/{SCHEDULER_CONFIG_NAME}",
]


@dataclass(frozen=True)
class StableDiffusion:
    """Configurations and weights of Stable Diffusion by part.

    Args:
        name: folder or hub id given by the user; None for the published configurations of v1.5.
        folder: folder of its files; None without files.
    """

    name: str | None
    folder: Path | None

    @classmethod
    def find(cls, name: str | Path | None) -> "StableDiffusion":
        """Locate a folder or download a hub id.

        Raises:
            ConversionError: it is not a Stable Diffusion folder, or cannot be downloaded.
        """
        if name is None:
            return cls(None, None)
        folder = find_folder(name, DOWNLOADED, "--decoder")
        absent = [part for part in NEEDED if not (folder / part).is_dir()]
        if absent:
            raise ConversionError(f"--decoder '{name}' is not a Stable Diffusion folder: {', '.join(absent)} missing.")
        return cls(str(name), folder)

    def config(self, part: str) -> dict[str, Any]:
        """Return the configuration of unet, vae or text_encoder."""
        if self.folder is None:
            return dict(CONFIGS[STABLE_DIFFUSION_1_5][part])
        return read_json(self.folder / part / CONFIG_FILE)

    def weights(self, part: str) -> Weights | None:
        """Return the weights of unet, vae or text_encoder, or None."""
        return None if self.folder is None else folder_weights(self.folder / part, part)

    def scheduler(self) -> SchedulerMixin:
        """Build the released code's "dpm" sampler with the noise schedule of the U-Net's training."""
        trained_with: Any
        try:
            if self.folder is None:
                trained_with = DDIMScheduler.from_config(CONFIGS[STABLE_DIFFUSION_1_5]["scheduler"])
            else:
                trained_with = DDIMScheduler.from_pretrained(self.folder, subfolder="scheduler")
        except (OSError, ValueError) as error:
            raise ConversionError(f"--decoder '{self.name}': its scheduler cannot be read: {error}") from error
        return build_scheduler("dpm", trained_with)

    def hint(self) -> str:
        """Return advice for weights that do not fit the configuration."""
        if self.folder is None:
            return " Without --decoder, Stable Diffusion v1.5 is assumed; give the one that the model was trained with."
        return f" Is --decoder '{self.name}' the Stable Diffusion that the model was trained with?"
