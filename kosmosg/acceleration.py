"""How the frozen image decoder is run: memory layout and compilation. Results are the same but for rounding.

What changes them beyond that is called fast (`fast_unguided_share` of `DiffusionSampler`) and is in no protocol.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


@dataclass
class Acceleration:
    channels_last: bool = False
    """Keep weights and activations of convolutions with their channels last, as tensor cores read them."""
    compile: bool = False
    """Compile the U-Net; the first batch of every size then takes a minute or more."""


def accelerate(unet: Module, vae: nn.Module | None, acceleration: Acceleration) -> Module:
    """Bring the networks into the form asked for, in place; the U-Net is given back."""
    if acceleration.channels_last:
        for network in filter(None, (unet, vae)):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if acceleration.compile:
        unet.compile()
    return unet
