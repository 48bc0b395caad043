"""What trains, what is frozen, and checkpoints that hold the former alone.

Loading checks the list of absent tensors exactly: a checkpoint fits a module when it holds the trained tensors, in
their shapes, and nothing else. Everything frozen comes from where it was built from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kosmosg.models.mllm import MLLM

NAMED_IN_ERRORS = 3


class CheckpointMismatchError(ValueError):
    """A checkpoint of another model or stage."""


@dataclass
class VisionTraining:
    """Which part of the image tower trains (paper section 3.2: "only the last layer")."""

    blocks: int = 1
    """How many of the last blocks train; -1 is the whole tower."""
    final_norm: bool = True
    """Whether the LayerNorm after the last block trains."""

    def __post_init__(self) -> None:
        if self.blocks < -1:
            raise ValueError(f"vision_training.blocks is {self.blocks}; allowed: -1 (all), 0, 1, 2, …")


def train_mllm(mllm: MLLM, vision: VisionTraining) -> None:
    """Let the decoder, the resampler and the end of the image tower train; freeze the rest of the tower.

    Raises:
        ValueError: more blocks asked for than the tower has.
    """
    clip = mllm.vision.clip
    blocks = clip.encoder.layers
    if vision.blocks > len(blocks):
        raise ValueError(f"vision_training.blocks is {vision.blocks}, but the image tower has {len(blocks)} blocks")
    mllm.requires_grad_(True)
    clip.requires_grad_(vision.blocks == -1)
    for block in list(blocks)[len(blocks) - vision.blocks :] if vision.blocks > 0 else []:
        block.requires_grad_(True)
    clip.post_layernorm.requires_grad_(vision.final_norm)


def trained_names(module: nn.Module) -> list[str]:
    """Names of the parameters that train, as in the state dict."""
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def keep_trained(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained tensors of a state dict. `state` is empty on ranks that do not write the checkpoint."""
    return {name: state[name] for name in trained_names(module) if name in state}


def check_trained(module: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Refuse a checkpoint that is not of this module's trained tensors.

    Raises:
        CheckpointMismatchError: names the first tensors that are absent, left over or of another shape.
    """
    expected = {
        name: tuple(parameter.shape) for name, parameter in module.named_parameters() if parameter.requires_grad
    }
    problems = [f"{name} is absent" for name in expected if name not in state]
    problems += [f"{name} is not trained here" for name in state if name not in expected]
    problems += [
        f"{name} is {tuple(state[name].shape)} there and {shape} here"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        more = f" and {len(problems) - NAMED_IN_ERRORS} more" if len(problems) > NAMED_IN_ERRORS else ""
        raise CheckpointMismatchError(
            f"{origin} is a checkpoint of another model: {'; '.join(problems[:NAMED_IN_ERRORS])}{more}. "
            "Use the configuration it was trained with, or another run folder."
        )


def describe_training(module: nn.Module) -> dict[str, Any]:
    """Parameters trained and frozen, for the log of a run."""
    counts = {True: 0, False: 0}
    for parameter in module.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    return {"trained_parameters": counts[True], "frozen_parameters": counts[False]}
