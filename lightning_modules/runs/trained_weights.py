"""What trains, what is frozen, and checkpoints that hold the former alone.

Loading checks the list of absent tensors exactly: a checkpoint fits a module when it holds the trained tensors, in
their shapes, and nothing else. Everything frozen comes from where it was built from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

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


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def check_trained(module: nn.Module, shapes: Mapping[str, Sequence[int]], origin: str) -> None:
    """Refuse a checkpoint that is not of this module's trained tensors, by their `shapes`.

    Raises:
        CheckpointMismatchError: names the first tensors that are absent, left over or of another shape.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in trained_parameters(module).items()}
    problems = [f"{name} is absent" for name in expected if name not in shapes]
    problems += [f"{name} is not trained here" for name in shapes if name not in expected]
    problems += [
        f"{name} is {tuple(shapes[name])} there and {shape} here"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != shape
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
