"""Every family of image decoders beside diffusers' own pipeline, in stages 2 and 3, and at full size."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import compute_snr
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import train
from datamodules.alignment import caption_tokens
from kosmosg.cli import main as kosmosg
from kosmosg.condition import Condition
from kosmosg.conversion.parts import build
from kosmosg.losses import diffusion_loss
from kosmosg.models.build import load_image_decoder
from kosmosg.models.image_decoder import ImageDecoder
from kosmosg.models.published import CONFIGS, STABLE_DIFFUSION_2_1, STABLE_DIFFUSION_2_1_BASE, STABLE_DIFFUSION_XL
from kosmosg.models.sana import INSTRUCTION, Sana
from kosmosg.sampling import DiffusionSampler
from tests import tiny
from tests.lightning_modules.miniature import KEYS, losses
from tests.lightning_modules.runs import run, weights

FAMILIES = ("2.1-base", "2.1", "xl", "sana")
CAPTIONS = ["a red fish", "a cat"]
TRACKED = {
    "alignment": ("train/mse_loss", "train/rec_loss", "val/mse_loss"),
    "instruction_tuning": ("train/loss", "grad_norm", "val/diffusion_loss"),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def decoder(family: str, tiny_folder: Callable[[str], Path]) -> ImageDecoder:
    return load_image_decoder(tiny_folder(family))


def captioned(decoder: ImageDecoder, captions: list[str]) -> Condition:
    return decoder.text_condition(decoder.tokenize(captions))


@pytest.mark.parametrize("family", ["2.1-base", "2.1", "xl"], indirect=True)
@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
def test_captions_give_the_images_of_diffusers_own_pipeline(
    guidance_scale: float, decoder: ImageDecoder, family: str, tiny_folder: Callable[[str], Path]
) -> None:
    """Bit for bit: the text anchor of stage 2, the null condition, sampling and decoding."""
    sampler = DiffusionSampler(decoder)
    theirs = DiffusionPipeline.from_pretrained(tiny_folder(family))
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = sampler.scheduler("dpm")
    for name in ("unet", "vae"):  # the same tensors: CPU kernels may round by where weights lie in memory
        loaded, ours = getattr(theirs, name).state_dict(), getattr(decoder, name)
        assert all(torch.equal(value, loaded[key]) for key, value in ours.state_dict().items())
        setattr(theirs, name, ours)
    options = {"height": 64, "width": 96, "num_inference_steps": 3, "guidance_scale": guidance_scale}
    seeds = [3, 4, 5, 6]
    expected = theirs(
        CAPTIONS,
        num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
        **options,
    ).images
    null = decoder.spec.null(captioned(decoder, [""] * len(CAPTIONS)))
    drawn = sampler(
        captioned(decoder, CAPTIONS), null, num_images_per_prompt=2, seeds=seeds, output_type="np", **options
    )
    assert np.array_equal(drawn, expected) and not np.array_equal(drawn[0], drawn[2])


def test_gradient_reaches_the_whole_condition_and_no_weight(decoder: ImageDecoder) -> None:
    frozen = {name: value.clone() for name, value in decoder.state_dict().items()}
    condition = captioned(decoder, CAPTIONS)
    leaves = [part.requires_grad_() for part in (condition.states, condition.pooled) if part is not None]
    images = torch.rand(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE) * 2 - 1
    posterior, noise = torch.randn(2, 2, *decoder.latent_shape(images)).unbind(0)
    latents, timesteps = decoder.latents(images, posterior), decoder.timesteps(torch.tensor([0.3, 0.7]))
    prediction = decoder.predict(decoder.add_noise(latents, noise, timesteps), timesteps, condition)
    diffusion_loss(prediction, decoder.training_target(latents, noise, timesteps)).backward()
    assert all((leaf.grad.flatten(1).norm(dim=1) > 0).all() for leaf in leaves)
    assert all(torch.equal(value, frozen[name]) for name, value in decoder.state_dict().items())
    assert not any(parameter.requires_grad for parameter in decoder.parameters())


@pytest.mark.parametrize("family", ["sana"], indirect=True)
@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
@pytest.mark.parametrize("sampler", ["dpm", None])
def test_sana_gives_the_images_of_diffusers_own_pipeline(
    guidance_scale: float, sampler: str | None, decoder: Sana, tiny_folder: Callable[[str], Path]
) -> None:
    """Bit for bit from the same embeddings; those of captions differ by the rounding of other lengths of padding."""
    theirs = DiffusionPipeline.from_pretrained(tiny_folder("sana"))
    theirs.set_progress_bar_config(disable=True)
    theirs.vae, theirs.transformer = decoder.vae, decoder.transformer
    given = theirs.encode_prompt(CAPTIONS, complex_human_instruction=INSTRUCTION.split("\n"))
    (states, mask), (null_states, null_mask) = given[:2], given[2:]
    condition, null = captioned(decoder, CAPTIONS), captioned(decoder, [""] * 2)
    for ours, its_states, its_mask in ((condition, states, mask), (null, null_states, null_mask)):
        assert torch.equal(ours.mask, its_mask.bool())
        torch.testing.assert_close(ours.states[ours.mask], its_states[ours.mask], rtol=0, atol=1e-6)
    assert null.mask.sum() == 2
    drawing = DiffusionSampler(decoder)
    options = {"height": 64, "width": 96, "num_inference_steps": 3, "guidance_scale": guidance_scale}
    expected = theirs(
        prompt_embeds=states,
        prompt_attention_mask=mask,
        negative_prompt=None,
        negative_prompt_embeds=null_states,
        negative_prompt_attention_mask=null_mask,
        use_resolution_binning=False,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 5)],
        output_type="np",
        **options,
    ).images
    conditions = Condition(states, mask.bool()), Condition(null_states, null_mask.bool())
    options |= {"output_type": "np", "sampler": sampler}
    assert np.array_equal(drawing(*conditions, seeds=[3, 5], **options), expected)
    several = drawing(*conditions, seeds=[3, 4, 5, 6], num_images_per_prompt=2, **options)
    np.testing.assert_allclose(several[::2], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["sana"], indirect=True)
def test_sana_is_told_time_and_velocity_as_its_scheduler_has_them(decoder: Sana) -> None:
    uniform = torch.tensor([0.25, 0.75])
    timesteps = decoder.timesteps(uniform)
    assert timesteps.tolist() == [500.0, 900.0]  # shift 3
    latents, noise = torch.randn(2, 2, 8, 8, 8).unbind(0)
    noisy = decoder.add_noise(latents, noise, timesteps)
    target = decoder.training_target(latents, noise, timesteps)
    sigmas = torch.tensor([0.5, 0.9])[:, None, None, None]
    torch.testing.assert_close(noisy - sigmas * target, latents)
    seen = []
    decoder.transformer.register_forward_pre_hook(lambda _, given, named: seen.append(named), with_kwargs=True)
    condition = captioned(decoder, CAPTIONS)
    decoder.predict(noisy, timesteps, condition)
    assert seen[0]["timestep"].tolist() == [250.0, 450.0]  # timestep_scale 0.5
    changed = condition._replace(states=condition.states + ~condition.mask[..., None])
    assert torch.equal(*(decoder.predict(noisy, timesteps, given) for given in (condition, changed)))
    with pytest.raises(ValueError, match="timestep_weighting='sds' is not defined for Sana"):
        decoder.loss_weights(timesteps, "sds")
    with pytest.raises(ValueError, match="sampler='ddim' is not allowed for flow matching"):
        DiffusionSampler(decoder)(condition, condition, sampler="ddim")


@pytest.mark.parametrize("family", ["sana"], indirect=True)
def test_states_of_a_caption_that_are_spread_draw_what_the_mask_draws(decoder: Sana) -> None:
    """Of the first caption 5 states count, which divides 10: the instruction's first and last, the caption's own."""
    condition = captioned(decoder, CAPTIONS)
    assert condition.mask.sum(dim=1).tolist() == [2 + 3, 2 + 2]
    noisy, timesteps = torch.randn(2, decoder.transformer.config.in_channels, 2, 2), torch.tensor([500.0, 900.0])
    drawn = [decoder.predict(noisy, timesteps, given) for given in (condition, condition.spread(10))]
    torch.testing.assert_close(drawn[1][:1], drawn[0][:1])
    ids, lengths = caption_tokens(decoder)(CAPTIONS)
    assert lengths == [3, 2] and torch.equal(ids, decoder.tokenize(CAPTIONS))


@pytest.mark.parametrize("family", ["2.1-base", "2.1", "xl"], indirect=True)
def test_a_perfect_prediction_is_the_noise_and_the_latents(decoder: ImageDecoder) -> None:
    """z_0 and ε follow from z_t and the training target, as the family's schedulers have it."""
    latents, noise = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64).unbind(0)
    timesteps = decoder.timesteps(torch.tensor([0.2, 0.8]))
    noisy = decoder.add_noise(latents, noise, timesteps)
    target = decoder.training_target(latents, noise, timesteps)
    alphas = decoder.schedule.alphas_cumprod[timesteps].double()[:, None, None, None]
    if decoder.prediction == "epsilon":
        found = (noisy - (1 - alphas).sqrt() * target) / alphas.sqrt()
    else:
        found = alphas.sqrt() * noisy - (1 - alphas).sqrt() * target
    torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["2.1-base", "2.1"], indirect=True)
def test_min_snr(decoder: ImageDecoder) -> None:
    """As diffusers' training scripts weigh their losses with --snr_gamma."""
    timesteps = torch.tensor([0, 300, 999])
    snr = compute_snr(decoder.schedule, timesteps)
    expected = snr.clamp(max=5.0) / (snr if decoder.prediction == "epsilon" else snr + 1)
    torch.testing.assert_close(decoder.loss_weights(timesteps, "uniform", 5.0), expected)
    if decoder.prediction == "v_prediction":
        with pytest.raises(ValueError, match=r"timestep_weighting='sds' is not defined .* predicts the velocity"):
            decoder.loss_weights(timesteps, "sds")


@pytest.mark.parametrize("family", ["2.1", "xl", "sana"])  # predicting the noise, 2.1 trains as 1.5
def test_stages_train_draw_and_dry_run(
    family: str,
    tiny_folder: Callable[[str], Path],
    configs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two steps of stage 2, then of stage 3 from what it wrote; the image decoder's bits stay. The finished run draws,
    and is described and exported by commands."""
    used, freeze = [], ImageDecoder.freeze
    arguments = [f"model.image_decoder={tiny_folder(family)}", "trainer.max_steps=2", "trainer.val_every=2"]
    arguments += ["grids={every: 2, prompts: 2, steps: 2}", *KEYS.get(family, [])]
    for stage, tracked in TRACKED.items():
        folder = tmp_path / f"{stage}-run"
        with monkeypatch.context() as watched:
            watched.setattr(ImageDecoder, "freeze", lambda decoder: used.append(decoder) or freeze(decoder))
            assert run(configs[stage], *arguments, f"run={folder}") == 0
        assert (folder / "grids" / "step-00000002.png").is_file()
        assert len(losses(folder, tracked)) == 2
        arguments.append(f"init_from={folder}")
    capsys.readouterr()
    assert run(configs[stage], *arguments, "dry_run=true") == 0
    assert "fits" in capsys.readouterr().out
    fresh = load_image_decoder(tiny_folder(family)).state_dict()
    assert len(used) >= 2 and all(
        torch.equal(value, fresh[name]) for decoder in used for name, value in decoder.state_dict().items()
    )
    assert kosmosg(["generate", str(folder), "a dog", "--steps", "2", "--output", str(tmp_path / "drawn")]) == 0
    with Image.open(tmp_path / "drawn" / "image-0.png") as image:
        assert image.size == (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    assert train.main(["export", str(folder), f"output={tmp_path / 'model'}"]) == 0
    assert weights(tmp_path) == weights(folder)
    capsys.readouterr()
    assert kosmosg(["inspect", str(folder)]) == 0
    missing = [*type(used[0]).networks, "scheduler"]
    assert f"missing for the pipeline: {', '.join(missing)}\n" in capsys.readouterr().out
    exported = kosmosg(["export", str(folder), str(tmp_path / "released.pt")])
    assert exported == (2 if family == "xl" else 0), "released checkpoints have no pooled vector"
    if exported:
        assert "has a pooled vector, which released checkpoints have no place for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (STABLE_DIFFUSION_2_1, {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}),
        (STABLE_DIFFUSION_XL, {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480}),
        (STABLE_DIFFUSION_2_1_BASE, {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}),
    ],
)
def test_published_configurations_have_the_published_sizes(name: str, expected: dict[str, int]) -> None:
    found = {part: build(part, CONFIGS[name][part]) for part in expected}
    if name == STABLE_DIFFUSION_XL:
        with torch.device("meta"):
            second = CLIPTextModelWithProjection(CLIPTextConfig(**CONFIGS[name]["text_encoder_2"]))
        assert sum(p.numel() for p in second.parameters()) == 694_659_840
    assert {part: sum(p.numel() for p in network.parameters()) for part, network in found.items()} == expected


def test_xl_as_its_folder_has_the_null_condition_and_its_sizes(tmp_path: Path) -> None:
    """Without force_zeros_for_empty_prompt the null condition is the unconditional prompt's; sizes are read."""
    folder = tiny.write_stable_diffusion_xl(tmp_path, force_zeros_for_empty_prompt=False)
    decoder = load_image_decoder(folder)
    assert decoder.spec.unconditional == decoder.from_config(folder).spec.unconditional == "prompt"
    assert decoder.spec == load_image_decoder(folder, "text").spec
    condition, seen = captioned(decoder, ["a cat"]), []
    decoder.unet.register_forward_pre_hook(lambda _, given, named: seen.append(named), with_kwargs=True)
    decoder.predict(torch.zeros(1, 4, 8, 12), torch.tensor([5]), condition)
    DiffusionSampler(decoder)(condition, condition, num_inference_steps=1, height=64, width=96, guidance_scale=1.0)
    trained, sampled = (named["added_cond_kwargs"]["time_ids"] for named in seen)
    assert trained.tolist() == sampled.tolist() == [[64, 96, 0, 0, 64, 96]]
