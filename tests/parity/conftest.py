"""One recorded set of the released code: its sizes, tensors and checkpoints, and our model built from them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel

from kosmosg.conversion import convert_state, read_checkpoint
from kosmosg.models.aligner import AlignerDecoder, AlignerEncoder
from kosmosg.models.kosmosg import KosmosG
from kosmosg.models.mllm import MLLM
from kosmosg.models.stable_diffusion import StableDiffusion
from kosmosg.prompt import PromptBatch

ACTIVATIONS = 1e-4  # absolute, as the set's README suggests
LOSSES = 1e-5  # relative
GRADIENT_NORMS = 1e-3  # relative, with an absolute floor
GRADIENT_FLOOR = 1e-6


class Tracked(dict):
    """Tensors by name, and which of them were asked for."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__(tensors)
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.asked.add(name)
        return super().__getitem__(name)


@dataclass
class Recording:
    """One golden folder, read once."""

    folder: Path

    def __post_init__(self):
        self.config = json.loads((self.folder / "config.json").read_text())
        self.facts = json.loads((self.folder / "facts.json").read_text())
        self.inputs = load_file(self.folder / "inputs.safetensors")
        self.outputs = Tracked(load_file(self.folder / "outputs.safetensors"))
        self.stable_diffusion = self.folder / "model" / "tiny_sd"

    def prompts(self, name: str) -> PromptBatch:
        """A recorded batch: interleaved, text, text_long or sample."""
        ids = self.inputs[f"{name}.src_tokens"]
        mask = self.inputs.get(f"{name}.img_gpt_input_mask", torch.zeros_like(ids, dtype=torch.bool))
        padding = ids == self.config["ids"]["<pad>"]
        return PromptBatch(ids=ids, image_mask=mask, images=self.inputs.get(f"{name}.images"), padding=padding)

    def mllm_sizes(self) -> dict:
        llm, vision, ids = self.config["llm"], self.config["vision"], self.config["ids"]
        return {
            "vocab_size": self.config["vocab_size"],
            "width": llm["dim"],
            "layers": llm["layers"],
            "heads": llm["heads"],
            "ffn_width": llm["ffn"],
            "image_tokens": llm["latent_query_num"],
            "vision_config": {
                "image_size": vision["image_size"],
                "patch_size": vision["patch_size"],
                "hidden_size": vision["width"],
                "num_hidden_layers": vision["layers"],
                "num_attention_heads": vision["heads"],
                "intermediate_size": round(vision["width"] * vision["mlp_ratio"]),
                "hidden_act": vision["act"],
                "layer_norm_eps": 1e-5,
            },
            "pad_id": ids["<pad>"],
            "bos_id": ids["<s>"],
        }

    def aligner_sizes(self) -> dict:
        aligner = self.config["aligner"]
        return {
            "width": aligner["dim"],
            "ffn_width": aligner["ffn"],
            "heads": aligner["heads"],
            "encoder_layers": aligner["encoder_layers"],
            "decoder_layers": aligner["decoder_layers"],
            "max_positions": aligner["max_positions"],
        }

    def load(self, checkpoint: str, **mllm_options) -> SimpleNamespace:
        """The parts of `model/checkpoint_{checkpoint}.pt`, strictly loaded, in eval mode."""
        state = read_checkpoint(self.folder / "model" / f"checkpoint_{checkpoint}.pt")["model"]
        converted = convert_state(state)
        loaded = SimpleNamespace(names=list(state), converted=converted)
        with torch.random.fork_rng():
            loaded.mllm = MLLM(**self.mllm_sizes(), **mllm_options)
            loaded.aligner = AlignerEncoder(
                input_width=self.config["llm"]["dim"],
                num_queries=self.config["aligner"]["num_queries"],
                **self.aligner_sizes(),
            )
            loaded.aligner_decoder = AlignerDecoder(output_width=self.config["llm"]["dim"], **self.aligner_sizes())
        for name in ("mllm", "aligner", "aligner_decoder"):
            if name in converted.parts:
                getattr(loaded, name).load_state_dict(converted.parts[name], strict=True)
            getattr(loaded, name).eval()
        loaded.model = KosmosG(loaded.mllm, loaded.aligner)
        return loaded

    def decoder(self) -> StableDiffusion:
        unet = UNet2DConditionModel.from_pretrained(self.stable_diffusion, subfolder="unet")
        vae = AutoencoderKL.from_pretrained(self.stable_diffusion, subfolder="vae")
        scheduler = DDPMScheduler.from_pretrained(self.stable_diffusion, subfolder="scheduler")
        text_encoder = CLIPTextModel.from_pretrained(self.stable_diffusion, subfolder="text_encoder")
        return StableDiffusion(unet, vae, scheduler, text_encoder).freeze()

    def assert_activation(
        self, ours: Tensor, name: str, view: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> None:
        """Within the activation tolerance of the recorded tensor; `view` brings it into our order."""
        self._compare(ours, name, view, rtol=0, atol=ACTIVATIONS)

    def assert_loss(self, ours: Tensor, name: str) -> None:
        """Within the loss tolerance of the recorded number."""
        self._compare(ours.reshape(-1), name, lambda tensor: tensor, rtol=LOSSES, atol=0)

    def assert_gradient(self, ours: Tensor, name: str) -> None:
        """Within 1e-3 of the recorded gradient's largest element; many are smaller than the activation tolerance."""
        largest = self.outputs[name].abs().max().item()
        self._compare(ours, name, lambda tensor: tensor, rtol=0, atol=min(ACTIVATIONS, GRADIENT_NORMS * largest))

    def _compare(self, ours: Tensor, name: str, view: Callable[[Tensor], Tensor], **tolerances: float) -> None:
        """Also shows that the comparison can fail: with one value changed by 1 % it does."""
        recorded = self.outputs[name]
        torch.testing.assert_close(ours, view(recorded), **tolerances, msg=lambda m: f"{name}: {m}")
        changed = recorded.clone().flatten()
        changed[changed.abs().argmax()] *= 1.01
        with pytest.raises(AssertionError):
            torch.testing.assert_close(ours, view(changed.view_as(recorded)), **tolerances)


@pytest.fixture(scope="session")
def recording(golden) -> Recording:
    return Recording(golden)


@pytest.fixture(scope="session")
def stage1(recording):
    return recording.load("stage1")


@pytest.fixture(scope="session")
def stage2(recording):
    return recording.load("stage2")


@pytest.fixture(scope="session")
def final(recording):
    return recording.load("final")


@pytest.fixture(scope="session")
def decoder(recording):
    return recording.decoder()
