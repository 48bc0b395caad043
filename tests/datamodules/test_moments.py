"""Moments beside shards: what the VAE would give, of this VAE and crop alone, and no target is decoded for them."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from datamodules.errors import DataError, ShardError
from datamodules.instruction import InstructionData, InstructionDataConfig
from datamodules.moments.__main__ import main
from datamodules.moments.files import moments_file, moments_identity
from datamodules.moments.writing import MomentsConfig, write_moments
from datamodules.sample import EditSample
from datamodules.shards import ShardWriter
from kosmosg.image_processing import ClipImageTransform, TargetTransform
from kosmosg.models.build import load_image_decoder
from kosmosg.models.image_decoder import ImageDecoder
from kosmosg.prompt import PromptEncoder
from kosmosg.tokenizer import Tokenizer
from tests import tiny
from tests.lightning_modules.miniature import picture

SAMPLES = 5


@pytest.fixture
def shards(tmp_path: Path) -> str:
    with ShardWriter(tmp_path / "edit", "train", samples_per_shard=3) as writer:
        for i in range(SAMPLES):
            writer.write(EditSample("a fish", "make it night", picture(i), picture(i + 50), key=f"e{i}"))
    return str(tmp_path / "edit" / "train-*.tar")


@pytest.fixture
def settings(shards: str, tiny_stable_diffusion: Path) -> MomentsConfig:
    return MomentsConfig(shards, str(tiny_stable_diffusion), tiny.IMAGE_SIZE, batch_size=2, device="cpu")


@pytest.fixture
def decoder(tiny_stable_diffusion: Path) -> ImageDecoder:
    return load_image_decoder(tiny_stable_diffusion, "images")


def data(shards: str, tokenizer: Path, identity: str | None, kept: bool = True) -> InstructionData:
    config = InstructionDataConfig(kept_moments=kept, micro_batch_size=SAMPLES)
    config.edit.shards = shards
    encoder = PromptEncoder(
        Tokenizer.from_pretrained(tokenizer), ClipImageTransform(tiny.IMAGE_SIZE), tiny.IMAGE_TOKENS
    )
    module = InstructionData(config, encoder, TargetTransform(tiny.IMAGE_SIZE), identity)
    module.setup()
    return module


def test_read_moments_are_those_of_the_images(
    shards: str, settings: MomentsConfig, decoder: ImageDecoder, tiny_tokenizer: Path
) -> None:
    counts = write_moments(settings)
    assert (counts.shards, counts.samples, counts.bad) == (2, SAMPLES, 0)
    identity = moments_identity(decoder.autoencoder, TargetTransform(tiny.IMAGE_SIZE))
    pixels, kept = (
        data(shards, tiny_tokenizer, identity, kept).train_dataset[range(SAMPLES)] for kept in (False, True)
    )
    assert decoder.are_moments(kept.targets) and not decoder.are_moments(pixels.targets)
    assert kept.report.samples == pixels.report.samples
    assert torch.equal(kept.prompt.ids, pixels.prompt.ids)
    torch.testing.assert_close(kept.targets, decoder.moments(pixels.targets), rtol=1e-5, atol=1e-5)
    noise = torch.randn(SAMPLES, 4, tiny.LATENT_SIZE, tiny.LATENT_SIZE)
    ours, online = decoder.latents(kept.targets, noise), decoder.latents(pixels.targets, noise)
    torch.testing.assert_close(ours, online, rtol=1e-5, atol=1e-5)


def test_a_second_run_finds_its_work_done(settings: MomentsConfig) -> None:
    write_moments(settings)
    again = write_moments(settings)
    assert (again.shards, again.there) == (0, 2)


def test_moments_of_another_vae_or_crop_are_refused(
    shards: str, settings: MomentsConfig, decoder: ImageDecoder, tiny_tokenizer: Path
) -> None:
    write_moments(settings)
    transform = TargetTransform(tiny.IMAGE_SIZE)
    own = moments_identity(decoder.autoencoder, transform)
    other = AutoencoderKL.from_config(decoder.autoencoder.config)
    for identity in (moments_identity(other, transform), moments_identity(decoder.autoencoder, TargetTransform(32))):
        assert identity != own
        with pytest.raises(ShardError, match=r"no moments .* for this VAE and crop; beside it lie those of another"):
            data(shards, tiny_tokenizer, identity)


def test_moments_of_other_samples_are_refused(
    shards: str, settings: MomentsConfig, decoder: ImageDecoder, tiny_tokenizer: Path
) -> None:
    write_moments(settings)
    identity = moments_identity(decoder.autoencoder, TargetTransform(tiny.IMAGE_SIZE))
    first, second = sorted(Path(shards).parent.glob("train-*.tar"))
    moments_file(second, identity).replace(moments_file(first, identity))
    with pytest.raises(ShardError, match="other samples"):
        data(shards, tiny_tokenizer, identity)


def test_an_unreadable_target_stays_an_error_of_its_own(
    tmp_path: Path, tiny_stable_diffusion: Path, decoder: ImageDecoder, tiny_tokenizer: Path
) -> None:
    sample = EditSample("a fish", "make it night", picture(0), picture(1), key="good")
    bad = EditSample("a fish", "make it night", picture(0), picture(2), key="bad")
    with ShardWriter(tmp_path, "train", samples_per_shard=4) as writer:
        writer.write(sample)
        members = bad.encode()
        bad.encode = lambda: {**members, "target.png": b"no image"}  # type: ignore[method-assign]
        writer.write(bad)
    shards = str(tmp_path / "train-*.tar")
    counts = write_moments(
        MomentsConfig(shards, str(tiny_stable_diffusion), tiny.IMAGE_SIZE, precision="float16", device="cpu")
    )
    assert (counts.samples, counts.bad) == (2, 1)
    identity = moments_identity(decoder.autoencoder, TargetTransform(tiny.IMAGE_SIZE))
    batch = data(shards, tiny_tokenizer, identity).train_dataset[[0, 1]]
    assert {name.rpartition("/")[2] for name in batch.report.samples} == {"good"}
    assert {error.reason for error in batch.report.errors} == {"unreadable_image"}
    assert batch.targets.dtype == torch.float32


def test_the_command_says_what_it_did(
    settings: MomentsConfig, capsys: pytest.CaptureFixture, tiny_stable_diffusion: Path
) -> None:
    arguments = [f"shards={settings.shards}", f"image_decoder={tiny_stable_diffusion}", "image_size=64", "device=cpu"]
    assert main(arguments) == 0
    assert f"2 shards written, 0 were there; {SAMPLES} samples, 0 unusable" in capsys.readouterr().out
    assert main(["shards=/nowhere/*.tar", *arguments[1:]]) == 2
    assert "no shard at" in capsys.readouterr().err


def test_samples_of_several_targets_are_refused(tmp_path: Path, settings: MomentsConfig) -> None:
    with ShardWriter(tmp_path / "pairs", "train") as writer:
        sample = EditSample("a fish", "make it night", picture(0), picture(1), more=[(picture(2), picture(3))])
        writer.write(sample)
    settings.shards = str(tmp_path / "pairs" / "train-*.tar")
    with pytest.raises(DataError, match=r"2 target images.*pairs=apart"):
        write_moments(settings)
