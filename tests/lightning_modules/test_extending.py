"""A fourth stage and another image decoder, defined here alone: they train, resume, draw grids and dry-run.

The stage learns the mean colour of a caption's image from the condition. The decoder is all that Stable Diffusion is
not: flow matching, a masked condition with a pooled vector, zeros as the null condition, a VAE with a shift.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor, nn

import train
from datamodules.alignment import AlignmentDataConfig
from datamodules.data_config import Source
from datamodules.datamodule import MixtureDataModule
from datamodules.errors import SampleError
from datamodules.images import load
from datamodules.mixture import RowBuilder
from datamodules.reader import SampleReader
from datamodules.sample import CaptionSample
from kosmosg.batches import MicroBatch, ReadReport
from kosmosg.condition import Condition, ConditionSpec
from kosmosg.image_processing import to_images
from kosmosg.models.build import IMAGE_DECODERS, build_aligner, build_mllm, load_image_decoder
from kosmosg.models.image_decoder import ImageDecoder, real_tensors
from kosmosg.models.kosmosg import KosmosG
from lightning_modules.base import PromptShape, StageModule, fake_prompts
from tests import tiny
from tests.lightning_modules.miniature import losses
from tests.lightning_modules.runs import back_to, run, weights

POOLED, CHANNELS, SIDE = 6, 2, 16
SHIFT, SCALE = 0.1, 1.5


class Denoiser(ModelMixin, ConfigMixin):
    """Velocity from latents, time and condition."""

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, width: int = tiny.CONDITION_WIDTH):
        super().__init__()
        self.read = nn.Linear(width + POOLED + 1, CHANNELS)
        self.mix = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, noisy: Tensor, time: Tensor, states: Tensor, mask: Tensor, pooled: Tensor) -> Tensor:
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        read = self.read(torch.cat([mean, pooled, time[:, None].to(mean.dtype)], dim=1))
        return self.mix(noisy) + read[:, :, None, None]


class Autoencoder(ModelMixin, ConfigMixin):
    """Pixels 3×H×W ↔ latents 2×H/4×W/4."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, CHANNELS, 4, stride=4), nn.ConvTranspose2d(CHANNELS, 3, 4, stride=4)


class FlowPipeline(DiffusionPipeline):
    """As much of diffusers' pipelines as sampling needs."""

    def __init__(self, denoiser: Denoiser, autoencoder: Autoencoder, scheduler: FlowMatchEulerDiscreteScheduler):
        super().__init__()
        self.register_modules(denoiser=denoiser, autoencoder=autoencoder, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, condition, unconditional, num_inference_steps, guidance_scale, generator, **_) -> tuple:
        noise = [torch.randn(CHANNELS, SIDE, SIDE, generator=source) for source in generator]
        latents = torch.stack(noise)
        self.scheduler.set_timesteps(num_inference_steps)
        for time in self.scheduler.timesteps:
            moment = time.expand(len(latents)) / 1000
            right, wrong = (self.denoiser(latents, moment, *given) for given in (condition, unconditional))
            latents = self.scheduler.step(wrong + guidance_scale * (right - wrong), time, latents)[0]
        return (to_images(self.autoencoder.up(latents / SCALE + SHIFT)),)


class FlowDecoder(ImageDecoder):
    def __init__(self, denoiser, autoencoder, embedding, scheduler=None):
        super().__init__()
        self._denoiser, self._autoencoder, self.embedding = denoiser, autoencoder, embedding
        self.scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
        self.spec = ConditionSpec(tiny.QUERIES, tiny.CONDITION_WIDTH, True, POOLED, unconditional="zeros")
        self.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, source, parts="all", torch_dtype=torch.float32, **options) -> "FlowDecoder":
        embedding = nn.Embedding(256, tiny.CONDITION_WIDTH)
        if parts != "images":
            embedding.load_state_dict(torch.load(Path(source) / "text.pt", weights_only=True))
        if parts == "text":
            return cls(None, None, embedding)
        return cls(
            Denoiser.from_pretrained(source, subfolder="denoiser"),
            Autoencoder.from_pretrained(source, subfolder="autoencoder"),
            embedding if parts == "all" else None,
        )

    @classmethod
    def from_config(cls, source, parts="all") -> "FlowDecoder":
        with real_tensors():
            scheduler = FlowMatchEulerDiscreteScheduler()
        embedding = nn.Embedding(256, tiny.CONDITION_WIDTH)
        networks = (None, None) if parts == "text" else (Denoiser(), Autoencoder())
        return cls(*networks, embedding, scheduler)

    @property
    def has_text_model(self) -> bool:
        return self.embedding is not None

    def tokenize(self, texts: Sequence[str], *, truncation: bool = True) -> Tensor:
        rows = [[ord(letter) % 256 for letter in text][: tiny.QUERIES] for text in texts]
        return torch.tensor([row + [0] * (tiny.QUERIES - len(row)) for row in rows])

    @torch.no_grad()
    def text_condition(self, text_ids: Tensor) -> Condition:
        states = self.embedding(text_ids)
        return Condition(states, text_ids > 0, states.mean(1)[:, :POOLED])

    def latent_shape(self, targets: Tensor) -> tuple[int, int, int]:
        factor = 1 if self.are_moments(targets) else 4
        return CHANNELS, targets.shape[-2] // factor, targets.shape[-1] // factor

    def image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        return height or 4 * SIDE, width or 4 * SIDE

    def are_moments(self, targets: Tensor) -> bool:
        return targets.shape[1] == CHANNELS

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        return self._autoencoder.down(images)

    @torch.no_grad()
    def latents(self, targets: Tensor, noise: Tensor) -> Tensor:
        latents = targets if self.are_moments(targets) else self.moments(targets)
        return (latents.repeat_interleave(len(noise) // len(latents), 0) - SHIFT) * SCALE

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self._autoencoder.up(latents / SCALE + SHIFT)

    def timesteps(self, uniform: Tensor) -> Tensor:
        """Logit-normal."""
        return torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4)).sigmoid().float()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        time = timesteps[:, None, None, None]
        return (1 - time) * latents + time * noise

    def training_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        self.check(condition)
        return self._denoiser(noisy, timesteps, *condition.with_mask())

    def diffusers_pipeline(self) -> FlowPipeline:
        return FlowPipeline(self._denoiser, self._autoencoder, self.scheduler)

    def pipeline_arguments(self, condition: Condition, unconditional: Condition) -> dict[str, Any]:
        return {"condition": condition.with_mask(), "unconditional": unconditional.with_mask()}

    @property
    def denoiser(self) -> Any:
        return self._denoiser

    @property
    def autoencoder(self) -> Any:
        return self._autoencoder


@dataclass
class ColourRecipe:
    weight: float = 1.0
    """Of the loss."""


@dataclass(kw_only=True)
class ColourBatch(MicroBatch):
    """`colours` B×3: the mean of each caption's image."""

    colours: Tensor


class ColourRows(RowBuilder):
    def __init__(self, source, encoder):
        super().__init__("captions", source)
        self.encoder = encoder

    def __call__(self, requests, report: ReadReport) -> list:
        report.reads += len(requests)
        return [self._row(request) for request in requests]

    def _row(self, request):
        try:
            sample = self.source(request.lane, request.row, request.attempt)
            pixels = torch.tensor(load(sample.image).convert("RGB").resize((1, 1)).getpixel((0, 0))) / 255
            return (self.encoder([sample.caption]), pixels), f"{sample.shard}/{sample.key}"
        except SampleError as error:
            return error

    def tokens(self, row) -> int:
        return len(row[0])


class ColourData(MixtureDataModule):
    Config = AlignmentDataConfig

    @classmethod
    def build(cls, config, encoder, image_size, decoder) -> "ColourData":
        data = cls(config)
        data.encoder = encoder
        return data

    def sources(self) -> dict[str, Source]:
        return {"captions": self.config.captions}

    def builder(self, name, shards, order) -> ColourRows:
        return ColourRows(SampleReader(shards, order, CaptionSample.kind, self.config.limits), self.encoder)

    def collate(self, rows: list, report: ReadReport) -> ColourBatch:
        prompt = self.encoder.collate([prompt for prompt, _ in rows])
        return ColourBatch(prompt=prompt, colours=torch.stack([colour for _, colour in rows]), report=report)


class ColourModule(StageModule):
    Recipe: ClassVar = ColourRecipe
    draws_images = True

    def __init__(self, mllm, aligner, decoder, recipe: ColourRecipe, optimizer, seed: int):
        super().__init__(optimizer, seed)
        self.mllm, self.aligner, self.image_decoder, self.recipe = mllm, aligner, decoder, recipe
        self.head = nn.Linear(POOLED, 3)
        mllm.requires_grad_(False)

    @classmethod
    def build(cls, experiment, tokenizer, load_decoder=load_image_decoder) -> "ColourModule":
        mllm = build_mllm(experiment.model, tokenizer, experiment.init_from)
        aligner = build_aligner(experiment.model)
        decoder = load_decoder(experiment.model.image_decoder, "all")
        return cls(mllm, aligner, decoder, experiment.recipe, experiment.optimizer, experiment.seed)

    @property
    def model(self) -> KosmosG:
        return KosmosG(self.mllm, self.aligner)

    def frozen_modules(self) -> Sequence[nn.Module]:
        return (self.mllm, self.image_decoder)

    def sharded_modules(self) -> Sequence[nn.Module]:
        return (self.mllm, self.aligner)

    def losses(self, batch: ColourBatch) -> dict[str, Tensor]:
        error = (self.head(self.model.condition(batch.prompt).pooled) - batch.colours).square().mean()
        return {"loss": self.recipe.weight * error}

    def validation_losses(self, batch: ColourBatch) -> dict[str, tuple[Tensor, int]]:
        return {"loss": (self.losses(batch)["loss"], len(batch))}

    def prompt_shape(self, experiment) -> PromptShape:
        return PromptShape(12, 0)

    def fake_batch(self, rows: int, shape: PromptShape, image_size: int) -> ColourBatch:
        prompt = fake_prompts(self.mllm, rows, shape)
        return ColourBatch(prompt=prompt, colours=torch.zeros(rows, 3, device=prompt.ids.device))

    def reference_images(self, batch: ColourBatch, sample) -> list[Image.Image]:
        return to_images(batch.colours[:, :, None, None].expand(-1, 3, 4, 4) * 2 - 1)

    def save_model(self, folder: Path, tokenizer) -> None:
        self.model.save_pretrained(folder, tokenizer)


@pytest.fixture
def flow_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "flow"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        Denoiser().save_pretrained(folder / "denoiser")
        Autoencoder().save_pretrained(folder / "autoencoder")
        torch.save(nn.Embedding(256, tiny.CONDITION_WIDTH).state_dict(), folder / "text.pt")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FlowPipeline"}))
    return folder


@pytest.fixture
def extended(configs: dict[str, Path], flow_folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Files of the fourth stage and of stage 3, both over the flow decoder."""
    monkeypatch.setitem(IMAGE_DECODERS, "FlowPipeline", FlowDecoder)
    monkeypatch.setitem(train.STAGES, "colour", train.stage(ColourModule, ColourData))
    files = {}
    for name, like in (("colour", "alignment"), ("flow", "instruction_tuning")):
        config = yaml.safe_load(configs[like].read_text())
        config |= {"stage": "colour" if name == "colour" else like, "run": str(configs[like].parent / name)}
        config["model"]["image_decoder"] = str(flow_folder)
        config["model"]["aligner"]["pooled_width"] = POOLED
        if name == "flow":
            config["recipe"] = {"new_aligner": True}
        config["grids"] = {"every": 2, "prompts": 2, "steps": 2}
        files[name] = configs[like].with_name(f"{name}.yaml")
        files[name].write_text(yaml.safe_dump(config))
    return files


@pytest.mark.parametrize("stage", ["colour", "flow"])
def test_it_trains_resumes_draws_and_dry_runs(
    stage: str, extended: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    assert run(extended[stage], f"run={folder}") == 0
    assert sorted(file.name for file in (folder / "grids").glob("*.png")) == ["step-00000002.png", "step-00000004.png"]
    names = ("train/loss", "grad_norm", "val/loss" if stage == "colour" else "val/diffusion_loss")
    rows, trained = losses(folder, names), weights(folder)
    back_to(folder, 2)
    assert run(extended[stage], f"run={folder}") == 0
    assert losses(folder, names) == rows and len(rows) == 4
    assert weights(folder) == trained
    capsys.readouterr()
    assert run(extended[stage], "dry_run=true") == 0
    assert "fits" in capsys.readouterr().out


def test_unknown_image_decoder_is_refused(
    extended: dict[str, Path], flow_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ("OtherPipeline", ["code", "OtherPipeline"]):
        (flow_folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
        assert run(extended["colour"]) == 2
        error = capsys.readouterr().err
        assert "is a OtherPipeline; allowed: StableDiffusionPipeline, " in error and "FlowPipeline" in error
