"""Recorded sets of the released code: their sizes, tensors and weights, and our model built from them.

Every test runs on the reduced set in `recorded/` and on a whole one where it is at hand (KOSMOSG_GOLDEN). The reduced
set is of the same numbers: stage 3 with its weights, N, and of stage 2 the states that N and the losses read.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

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
    """Tensors by name, and which of them were asked for; skips a test that asks for one that is not in the set."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__(tensors)
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            pytest.skip(f"{name} is in whole recorded sets alone; set KOSMOSG_GOLDEN")
        self.asked.add(name)
        return super().__getitem__(name)


@dataclass
class Recording:
    """One recorded set, read once."""

    folder: Path

    def __post_init__(self):
        self.reduced = (self.folder / "weights.safetensors").is_file()
        self.config = json.loads((self.folder / "config.json").read_text())
        self.facts = json.loads((self.folder / "facts.json").read_text())
        self.inputs = Tracked(load_file(self.folder / "inputs.safetensors"))
        self.outputs = Tracked(load_file(self.folder / "outputs.safetensors"))
        self.stable_diffusion = self.folder / ("stable_diffusion" if self.reduced else "model/tiny_sd")

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

    def state(self, checkpoint: str) -> dict[str, Tensor]:
        """The weights of stage1, stage2 or final under their released names; the reduced set has N alone of stage 2."""
        if not self.reduced:
            return read_checkpoint(self.folder / "model" / f"checkpoint_{checkpoint}.pt")["model"]
        if checkpoint == "stage1":
            pytest.skip("stage 1 is in whole recorded sets alone; set KOSMOSG_GOLDEN")
        weights = load_file(self.folder / "weights.safetensors")
        for name in ("encoder_proj.embed_positions.weight", "decoder_proj.embed_positions.weight", "decoder_query"):
            rows = weights[f"aligner.{name}"]  # those that a recorded prompt reaches
            weights[f"aligner.{name}"] = torch.cat(
                [rows, torch.zeros(self.config["aligner"]["max_positions"] - len(rows), rows.shape[1])]
            )
        of_stage_2 = ("aligner.decoder", "aligner.clip_encoder.")
        return {name: t for name, t in weights.items() if name.startswith(of_stage_2) == (checkpoint == "stage2")}

    def load(self, checkpoint: str, **mllm_options) -> SimpleNamespace:
        """What `state` has, strictly loaded, in eval mode; other parts are None."""
        converted = convert_state(self.state(checkpoint))
        loaded = SimpleNamespace(converted=converted)
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
            else:
                setattr(loaded, name, None)
        if loaded.mllm is not None and loaded.aligner is not None:
            loaded.model = KosmosG(loaded.mllm, loaded.aligner)
        return loaded

    def decoder(self) -> StableDiffusion:
        """Stable Diffusion from its configurations and the checkpoints' weights."""
        decoder = StableDiffusion.from_config(self.stable_diffusion, "images")
        final, stage2 = (convert_state(self.state(checkpoint)).parts for checkpoint in ("final", "stage2"))
        for part in ("unet", "vae"):
            getattr(decoder, part).load_state_dict(final[part], strict=True)
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(self.stable_diffusion / "text_encoder"))
        own = next(iter(text.state_dict())).startswith("text_model.")
        names = {name: name if own else name.removeprefix("text_model.") for name in stage2["text_encoder"]}
        text.load_state_dict({names[name]: t for name, t in stage2["text_encoder"].items()}, strict=True)
        return StableDiffusion(decoder.unet, decoder.vae, decoder.scheduler, text).freeze()

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


@pytest.fixture(scope="session", params=["reduced", "whole"])
def recording(request) -> Recording:
    return Recording(request.getfixturevalue("recorded" if request.param == "reduced" else "golden"))


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
