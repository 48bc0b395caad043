"""Configuration of benchmarks, and the stages' modules with random weights at a size of benchmarks/sizes/."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.convert_memory import write_tokenizer
from kosmosg.batches import MicroBatch
from kosmosg.config import ConfigError, load_config
from kosmosg.models.build import image_decoder_class
from kosmosg.models.image_decoder import ImageDecoder, Parts
from kosmosg.models.model_config import ModelConfig
from kosmosg.models.published import CONFIGS, STABLE_DIFFUSION_1_5, config_file
from kosmosg.tokenizer import Tokenizer
from lightning_modules.base import StageModule
from lightning_modules.parallelize import apply_activation_checkpointing, store_frozen_weights
from train import stage_schema

SIZES = Path(__file__).resolve().parent / "sizes"
FIRST_WORD = 8  # ids below are special or an image's
ONE_DEVICE = ("trainer.devices=1", "trainer.strategy=single", "trainer.global_batch_size=null", "run=none")


@dataclass
class Sampling:
    images: int = 8
    """Number of images per batch."""
    steps: int = 50
    """Number of denoising steps."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the image decoder."""


@dataclass
class BenchmarkConfig:
    name: str = "gpu"
    """Name of the size, for the report."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Network sizes; weights are random."""
    vocabulary: int = 64_007
    """Vocabulary size of the tokenizer."""
    decoder: dict[str, Any] = field(default_factory=dict)
    """Changes to the configurations of Stable Diffusion v1.5 (unet, vae, text_encoder), if it is the image decoder."""
    stages: dict[str, list[str]] = field(default_factory=dict)
    """Arguments of train.py for each part: a stage, or a stage with the configuration for some GPU."""
    sampling: Sampling = field(default_factory=Sampling)
    """Sampling that is compared with diffusers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if available."""
    compile: bool = True
    """Also measure compiled networks."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: CPU seconds of the process, for machines that are shared with other jobs."""
    repetitions: int = 10
    """Number of measured repetitions; fewer if a part runs out of time."""
    warmup: int = 2
    """Number of repetitions before the measured ones."""
    part_seconds: float = 130
    """Time limit of each part in seconds."""
    total_seconds: float = 570
    """Time limit of all parts together in seconds."""
    output: str = "runs/benchmarks.jsonl"
    """File to which every result is appended."""
    seed: int = 0
    """Seed of weights, lengths and values."""

    def __post_init__(self) -> None:
        for name, minimum in (("repetitions", 1), ("warmup", 0), ("part_seconds", 0), ("total_seconds", 0)):
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {minimum} or more")
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"


def read_config(arguments: Sequence[str], schema: type[Any] = BenchmarkConfig) -> Any:
    """Load the size that `size=` names (default cpu), overridden by the other arguments. Raises ConfigError."""
    sizes = [argument.partition("=")[2] for argument in arguments if argument.startswith("size=")] or ["cpu"]
    file = SIZES / f"{sizes[-1]}.yaml"
    if not file.is_file():
        raise ConfigError(f"size is {sizes[-1]!r}; allowed: {', '.join(sorted(path.stem for path in SIZES.glob('*')))}")
    return load_config([str(file), *(each for each in arguments if not each.startswith("size="))], schema)


class Setting:
    """Experiments and networks of one size.

    Args:
        folder: temporary folder for a generated tokenizer and for configurations of the image decoder.
    """

    def __init__(self, config: BenchmarkConfig, folder: Path):
        self.config, self.device = config, torch.device(config.device)
        model = replace(config.model, vision_weights=None)
        if not Path(model.tokenizer).is_dir():
            write_tokenizer(folder, config.vocabulary)
            model = replace(model, tokenizer=str(folder))
        if model.image_decoder == STABLE_DIFFUSION_1_5:
            for part in ("unet", "vae", "text_encoder", "scheduler"):
                file = config_file(part)
                (folder / file).parent.mkdir()
                values = {**CONFIGS[STABLE_DIFFUSION_1_5][part], **config.decoder.get(part, {})}
                (folder / file).write_text(json.dumps(values))
            model = replace(model, image_decoder=str(folder))
        self.model, self.tokenizer = model, Tokenizer.from_pretrained(Path(model.tokenizer))

    def experiment(self, part: str, *changes: str) -> Any:
        """Load the configuration of a part for one device, at this size.

        Raises:
            ConfigError: the size does not have the part, or an argument is invalid.
        """
        if part not in self.config.stages:
            raise ConfigError(
                f"size {self.config.name} has no part '{part}'; allowed: {', '.join([*self.config.stages, 'sampling'])}"
            )
        experiment = load_config([*self.config.stages[part], *ONE_DEVICE, *changes], stage_schema)
        return replace(experiment, model=deepcopy(self.model), init_from=None)

    def build(self, experiment: Any) -> StageModule:
        """Build the stage's module in training mode, with random weights drawn on the device."""
        with torch.random.fork_rng(), torch.device(self.device):
            torch.manual_seed(self.config.seed)
            module = experiment.module.build(experiment, self.tokenizer, self.load_decoder).to(self.device).train()
        store_frozen_weights(module, experiment.trainer.frozen_storage)
        apply_activation_checkpointing(module, experiment.trainer.activation_checkpointing)
        return module

    def load_decoder(self, source: str | Path, parts: Parts = "all") -> ImageDecoder:
        """Build an image decoder with random weights."""
        return image_decoder_class(source).from_config(source, parts)

    def fill(self, batch: Any) -> Any:
        """Fill the batch with random words and pixels, because a GPU's clock rate depends on the values."""
        source = torch.Generator(self.device).manual_seed(self.config.seed)

        def filled(value: Tensor, words: int) -> Tensor:
            if value.is_floating_point():
                return torch.randn(value.shape, generator=source, device=self.device).clamp(-1, 1)
            return torch.randint(FIRST_WORD, words, value.shape, generator=source, device=self.device)

        prompt, words = batch.prompt, len(self.tokenizer)
        images = None if prompt.images is None else filled(prompt.images, words)
        prompt = replace(prompt, ids=filled(prompt.ids, words), images=images)
        # Ids outside of the prompt may be of a smaller vocabulary.
        own = {item.name: getattr(batch, item.name) for item in fields(batch)}
        own = {name: filled(value, min(words, 256)) for name, value in own.items() if isinstance(value, Tensor)}
        return replace(batch, prompt=prompt, **own)


@contextmanager
def open_setting(config: BenchmarkConfig) -> Iterator[Setting]:
    """Create a `Setting` in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        yield Setting(config, Path(folder))


def backward(module: StageModule, batch: MicroBatch, precision: str) -> Tensor:
    """Run a forward and backward pass and return the loss, with Lightning's `precision`."""
    device = module.device.type
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16-mixed"):
        loss = module.losses(batch)["loss"]
    loss.backward()
    return loss.detach()
