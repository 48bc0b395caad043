"""The Stable Diffusion that a model steers: a diffusers folder, a hub id, or v1.5 by its published configurations."""

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
    """Configurations and weights by part.

    Args:
        name: as it was given; None for v1.5's published configurations.
        folder: its files; None where there are none.
    """

    name: str | None
    folder: Path | None

    @classmethod
    def find(cls, name: str | Path | None) -> "StableDiffusion":
        """A folder or hub id.

        Raises:
            ConversionError: neither a Stable Diffusion folder nor a hub id that can be fetched.
        """
        if name is None:
            return cls(None, None)
        folder = find_folder(name, DOWNLOADED, "--decoder")
        absent = [part for part in NEEDED if not (folder / part).is_dir()]
        if absent:
            raise ConversionError(f"--decoder '{name}' is no Stable Diffusion folder: {', '.join(absent)} missing.")
        return cls(str(name), folder)

    def config(self, part: str) -> dict[str, Any]:
        """Configuration of unet, vae or text_encoder."""
        if self.folder is None:
            return dict(CONFIGS[STABLE_DIFFUSION_1_5][part])
        return read_json(self.folder / part / CONFIG_FILE)

    def weights(self, part: str) -> Weights | None:
        """Weights of unet, vae or text_encoder; None where there are none."""
        return None if self.folder is None else folder_weights(self.folder / part, part)

    def scheduler(self) -> SchedulerMixin:
        """The released code's "dpm" sampler over the noise schedule that the U-Net was trained with."""
        trained_with: Any
        try:
            if self.folder is None:
                trained_with = DDIMScheduler.from_config(CONFIGS[STABLE_DIFFUSION_1_5]["scheduler"])
            else:
                trained_with = DDIMScheduler.from_pretrained(self.folder, subfolder="scheduler")
        except (OSError, ValueError) as error:
            raise ConversionError(f"--decoder '{self.name}': its scheduler was not read: {error}") from error
        return build_scheduler("dpm", trained_with)

    def hint(self) -> str:
        """What to do when weights do not fit the configuration."""
        if self.folder is None:
            return " Without --decoder, Stable Diffusion v1.5 is assumed; name the one that the model was trained with."
        return f" Is --decoder '{self.name}' the Stable Diffusion that the model was trained with?"
