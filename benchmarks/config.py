"""The schema of `benchmarks/sizes/*.yaml`: the model's sizes, the batches, how often what is timed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from kosmosg.config import ConfigError, load_config
from kosmosg.models.model_config import ModelConfig

SIZES = Path(__file__).resolve().parent / "sizes"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Lengths:
    """Tokens of a text, log-normal and cut at both ends."""

    median: float = 15.5
    """Half of the texts are shorter."""
    sigma: float = 0.65
    """Of the logarithm; with median 15.5 the mean is 19, and the longest of 56 captions about 70 tokens."""
    shortest: int = 3
    """Shorter draws count as this."""
    longest: int = 85
    """Longer draws count as this; the released filter leaves out captions of more pieces."""

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(f"lengths {self.shortest} … {self.longest} are not allowed; 1 ≤ shortest ≤ longest.")


@dataclass
class Stage1:
    rows: int = 3
    """Packed rows of a step."""
    row_tokens: int = 2048
    """Tokens of a packed row."""
    text: Lengths = field(default_factory=lambda: Lengths(median=500, sigma=1.0, shortest=30, longest=2048))
    """Text documents, cut at a row; published means of web pages lie between 500 and 1,000 tokens."""
    captions: Lengths = field(default_factory=Lengths)
    """Captions of image-caption pairs."""
    shares: list[int] = field(default_factory=lambda: [5, 5, 2])
    """Rows of text, pairs and interleaved documents (paper section 3.2)."""
    loss_chunk: int = 1024
    """recipe.loss_chunk of the default way."""
    recompute: bool = True
    """Whether the default way recomputes layers in the backward pass."""


@dataclass
class Stage2:
    captions: int = 56
    """Captions of a step; the released script has 56 a process."""
    lengths: Lengths = field(default_factory=Lengths)
    """Of the captions, `<s>` aside."""
    length_groups: int = 4
    """recipe.length_groups of the default way."""


@dataclass
class Stage3:
    samples: int = 16
    """Samples of a step; the released script has 16 a process."""
    captions: Lengths = field(default_factory=Lengths)
    """Captions of pairs, and of samples with entities."""
    instructions: Lengths = field(default_factory=lambda: Lengths(median=9, sigma=0.4, shortest=3, longest=40))
    """Instructions of edits."""
    entities: list[float] = field(default_factory=lambda: [0.4, 0.35, 0.15, 0.1])
    """Shares of constructed samples with 1, 2, 3, 4 images."""
    length_groups: int = 4
    """recipe.length_groups of the default way."""


@dataclass
class Sampling:
    prompts: int = 4
    """Images made at once."""
    steps: int = 50
    """Denoising steps."""
    channels_last: bool = True
    """acceleration.channels_last of the default way, here and in the evaluation."""
    compile: bool = False
    """acceleration.compile of the default way, here and in the evaluation."""


@dataclass
class Evaluation:
    subjects: int = 4
    """Subjects, each with one input image."""
    templates: int = 5
    """Prompts of each subject."""
    images: int = 2
    """Images of each prompt."""
    released_prompts: int = 5
    """Prompts that the released loop makes at once."""
    batch_size: int = 50
    """Images that the default way makes at once."""
    steps: int = 10
    """Denoising steps."""


@dataclass
class BenchmarkConfig:
    name: str = "cpu"
    """Of the size, for the report."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """As configs/model/; its paths are not read."""
    vocabulary: int = 64_007
    """Rows of the embedding."""
    unet: dict[str, Any] = field(default_factory=dict)
    """What differs from Stable Diffusion v1.5's U-Net."""
    vae: dict[str, Any] = field(default_factory=dict)
    """What differs from its VAE."""
    text_encoder: dict[str, Any] = field(default_factory=dict)
    """What differs from its CLIP text model."""
    stage1: Stage1 = field(default_factory=Stage1)
    """Batches of stage 1."""
    stage2: Stage2 = field(default_factory=Stage2)
    """Batches of stage 2."""
    stage3: Stage3 = field(default_factory=Stage3)
    """Batches of stage 3."""
    sampling: Sampling = field(default_factory=Sampling)
    """What is sampled."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    """What is evaluated."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the arithmetic; bfloat16 by autocast in training, of the weights in sampling."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: the process's own seconds on all its cores, for machines whose cores others use meanwhile."""
    repetitions: int = 7
    """Turns that count."""
    warm_up: int = 1
    """Turns before them."""
    levers: bool = True
    """Measure each lever alone as well."""
    scaling: bool = True
    """Measure the default way at other batches, lengths and numbers of images as well."""
    seed: int = 0
    """Of weights, lengths and noise."""

    def __post_init__(self) -> None:
        for name, least in (("repetitions", 1), ("warm_up", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be at least {least}.")

    def torch_device(self) -> torch.device:
        """The device that `device` means here."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]


def read_config(arguments: Sequence[str]) -> BenchmarkConfig:
    """The size that `size=` names (cpu if none does), and the other arguments over it. Raises ConfigError."""
    sizes = [argument.partition("=")[2] for argument in arguments if argument.startswith("size=")] or ["cpu"]
    file = SIZES / f"{sizes[-1]}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in SIZES.glob("*.yaml")))
        raise ConfigError(f"size={sizes[-1]} is unknown; allowed: {known}.")
    rest = [argument for argument in arguments if not argument.startswith("size=")]
    return load_config([str(file), *rest], BenchmarkConfig)
