"""What a dry run assumes of the machine and of the data. Nothing here is measured by us; each figure can be set."""

from dataclasses import dataclass, replace
from typing import NamedTuple


class Device(NamedTuple):
    """A card: memory in GiB that PyTorch sees, peak TFLOP/s of dense matrix products by precision (maker's sheets)."""

    memory_gib: float
    half_tflops: float
    single_tflops: float
    has_bf16: bool = True


DEVICES = {
    "h200-141gb": Device(139.8, 989.0, 67.0),
    "h100-80gb": Device(79.1, 989.0, 67.0),
    "a100-80gb": Device(79.1, 312.0, 19.5),
    "a100-40gb": Device(39.4, 312.0, 19.5),
    "rtx4090-24gb": Device(23.5, 165.0, 82.6),
    "rtx3090-24gb": Device(23.6, 71.0, 35.6),
    "v100-32gb": Device(31.7, 125.0, 15.7, has_bf16=False),
}


@dataclass
class HardwareConfig:
    device: str = "h100-80gb"
    """Card that the dry run counts with, see lightning_modules/estimate/hardware.py."""
    memory_gib: float | None = None
    """Memory of a card; null: the device's."""
    tflops: float | None = None
    """Peak TFLOP/s of a card in the run's precision; null: the device's."""
    utilisation: float = 0.3
    """Share of the peak that is assumed to be reached."""
    reserve_gib: float = 2.0
    """Memory that CUDA, NCCL and fragmentation are assumed to take on each card."""
    prompt_tokens: int | None = None
    """Tokens of a row, padding included; null: data.sequence_length in stage 1, 75 in stage 2, 160 in stage 3."""
    images_per_row: int | None = None
    """Images in a row's prompt; null: 11 in stage 1, 0 in stage 2, 2 in stage 3."""

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ValueError(f"hardware.device is {self.device!r}; allowed: {', '.join(DEVICES)}")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"hardware.utilisation is {self.utilisation}; allowed: above 0, at most 1")
        for name in ("memory_gib", "tflops", "reserve_gib", "prompt_tokens", "images_per_row"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"hardware.{name} is {value}; allowed: 0 or more")

    def resolved(self) -> Device:
        """The device with what is set here in its place."""
        device = DEVICES[self.device]
        if self.memory_gib is not None:
            device = device._replace(memory_gib=self.memory_gib)
        return device if self.tflops is None else device._replace(half_tflops=self.tflops, single_tflops=self.tflops)

    def with_defaults(self, prompt_tokens: int, images_per_row: int) -> "HardwareConfig":
        """The same with a stage's shape of prompts where none is given."""
        tokens = prompt_tokens if self.prompt_tokens is None else self.prompt_tokens
        images = images_per_row if self.images_per_row is None else self.images_per_row
        return replace(self, prompt_tokens=tokens, images_per_row=images)
