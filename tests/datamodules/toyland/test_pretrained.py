"""The tiny pretrained models: the shipped ones are what they should be, and the recipe makes such ones."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTokenizer, ResNetForImageClassification, ViTModel

import datamodules.toyland
from datamodules.toyland.pretrained import report
from datamodules.toyland.pretrained.__main__ import WEIGHTS, main
from datamodules.toyland.pretrained.data import draw_pool
from datamodules.toyland.pretrained.encoders import normalized
from datamodules.toyland.pretrained.stable_diffusion import build_autoencoder, train_decoder
from datamodules.toyland.pretrained.training import fit
from datamodules.toyland.scene import SIZE
from kosmosg.tokenizer import Tokenizer

BYTES = 16_000_000


def check(folder: Path) -> None:
    """Every model loads by the library's own from_pretrained with every weight, and is stored in half precision."""
    files = list(folder.rglob("*.safetensors"))
    assert files and all(
        t.dtype == torch.float16 for f in files for t in load_file(f).values() if t.is_floating_point()
    )
    assert not [f for f in folder.rglob("*.json") if "_name_or_path" in f.read_text()]  # where it was made is no matter
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder / "stable-diffusion", dtype=torch.float32, safety_checker=None
    )
    assert pipeline.unet.config.in_channels == pipeline.vae.config.latent_channels
    assert pipeline.vae.config.sample_size == SIZE and pipeline.scheduler.config.prediction_type == "epsilon"
    for kind, name, options in (
        (CLIPModel, "clip", {}),
        (ViTModel, "dino", {"add_pooling_layer": False}),
        (ResNetForImageClassification, "judge", {}),
    ):
        model, report = kind.from_pretrained(folder / name, output_loading_info=True, dtype=torch.float32, **options)
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        if kind is CLIPModel:
            clip = model.eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "clip")
    ids = torch.tensor([tokenizer("a red fish", padding="max_length", max_length=32).input_ids])
    with torch.no_grad():  # the U-Net's text encoder is the text tower of the CLIP that the MLLM sees with
        ours, theirs = (m(input_ids=ids).last_hidden_state for m in (pipeline.text_encoder, clip.text_model))
    assert torch.equal(ours, theirs)
    assert pipeline.tokenizer("a red fish").input_ids == tokenizer("a red fish").input_ids
    words = Tokenizer.from_pretrained(folder / "tokenizer")
    assert words.unk_id not in words.encode("a red fish wearing a black top hat on a cobblestone street, upside down")


def test_shipped_models_load_and_are_small():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= BYTES
    check(WEIGHTS)


def test_shipped_clip_finds_the_caption_of_a_picture(tmp_path):
    pool = draw_pool(tmp_path, 48, seed=99, looks_share=1.0)
    clip = CLIPModel.from_pretrained(WEIGHTS / "clip", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "clip")
    tokens = tokenizer(pool.captions, padding="max_length", truncation=True, max_length=32, return_tensors="pt")
    with torch.no_grad():
        logits = clip(input_ids=tokens.input_ids, pixel_values=normalized(pool.images)).logits_per_image
    assert (logits.argmax(-1) == torch.arange(48)).float().mean() > 0.7  # chance is 0.02


def test_the_decoder_trains_on_alone(tmp_path):
    torch.manual_seed(0)
    vae = build_autoencoder()
    before = {name: weight.clone() for name, weight in vae.state_dict().items()}
    pool = draw_pool(tmp_path, 16, seed=5, looks_share=1.0)
    train_decoder(vae, pool, tmp_path / "decoder.pt", steps=2, batch_size=4, lr=1e-3, seed=0)
    changed = {name.split(".")[0] for name, weight in vae.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {"decoder", "post_quant_conv"}


@pytest.mark.slow
def test_the_recipe_writes_such_models_and_trains_none_twice(tmp_path, capsys):
    schedules = ("vae", "decoder", "clip", "clip_patterns", "dino", "judge", "unet", "unet_velocity")
    command = [
        *(f"{schedule}.{short}" for schedule in schedules for short in ("steps=2", "batch_size=4")),
        "pictures=64",
        "pairs=8",
        f"output={tmp_path / 'weights'}",
        f"work={tmp_path / 'work'}",
    ]
    main(command)
    check(tmp_path / "weights")
    capsys.readouterr()
    main(command)
    assert capsys.readouterr().out == ""
    report.main([f"output={tmp_path / 'weights'}", f"work={tmp_path / 'work'}", "scenes=16"])
    found, shipped = (json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "weights", WEIGHTS))
    assert found.keys() == shipped.keys() and found["clip"].keys() == shipped["clip"].keys()
    assert all(figure == figure for network in ("clip", "judge", "vae") for figure in found[network].values())


@pytest.mark.slow
def test_probes_tell_where_a_look_is_lost(tmp_path, capsys):
    model = Path(datamodules.toyland.__file__).parent / "model"
    report.main([f"model={model}", f"work={tmp_path}", "scenes=100"])
    lines = re.findall(r"^(.{20}) (.{48}) ([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    found = {(place.strip(), group.strip()): float(figure) for place, group, figure in lines}
    assert {place for place, _ in found} == {"vision encoder", "resampler", "MLLM's image tokens", "M"}
    assert all(found[place, "kind"] > 0.5 for place in ("vision encoder", "M"))  # chance is 0.06


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.toyland.pretrained.training.SAVE_EVERY", 0.0)

    def trained(checkpoint: Path, stop_at: int | None = None) -> torch.Tensor:
        torch.manual_seed(0)
        network, draws = torch.nn.Linear(3, 1), torch.Generator().manual_seed(1)

        def loss(step: int):
            if step == stop_at:
                raise KeyboardInterrupt
            return network(torch.randn(4, 3, generator=draws)).square().mean(), {}

        fit(checkpoint, [network], loss, draws, steps=9, lr=0.1, average=0.9)
        return network.weight.detach()

    whole = trained(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped.pt", stop_at=5)
    assert torch.equal(trained(tmp_path / "stopped.pt"), whole)
