"""Cached latents: what the VAE would give, of this VAE, crop and precision alone, and no target is decoded for them."""

import fcntl
import tarfile
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from datamodules.cached_latents import CachedLatentsConfig, latents_files, latents_identity, main, write_latents
from datamodules.errors import DataError, ShardError
from datamodules.instruction import InstructionData, InstructionDataConfig
from datamodules.sample import EditSample
from datamodules.shard_writer import ShardWriter
from datamodules.shards import list_shards
from kosmosg.cli import main as kosmosg
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
def settings(shards: str, tiny_stable_diffusion: Path) -> CachedLatentsConfig:
    return CachedLatentsConfig(shards, str(tiny_stable_diffusion), tiny.IMAGE_SIZE, batch_size=2)


@pytest.fixture
def decoder(tiny_stable_diffusion: Path) -> ImageDecoder:
    return load_image_decoder(tiny_stable_diffusion, "images")


def identity_of(decoder: ImageDecoder, precision: str = "float32", size: int = tiny.IMAGE_SIZE) -> str:
    return latents_identity(decoder.autoencoder, TargetTransform(size), precision)


def data(shards: str, tokenizer: Path, identity: str | None, precision: str | None = "float32") -> InstructionData:
    config = InstructionDataConfig(cached_latents=precision, micro_batch_size=SAMPLES)
    config.edit.shards = shards
    encoder = PromptEncoder(
        Tokenizer.from_pretrained(tokenizer), ClipImageTransform(tiny.IMAGE_SIZE), tiny.IMAGE_TOKENS
    )
    module = InstructionData(config, encoder, TargetTransform(tiny.IMAGE_SIZE), identity)
    module.setup()
    return module


def test_cached_latents_are_those_of_the_images(
    shards: str, settings: CachedLatentsConfig, decoder: ImageDecoder, tiny_tokenizer: Path
) -> None:
    assert write_latents(settings) == {"written": 2, "samples": SAMPLES, "unusable": 0}
    pixels, cached = (
        data(shards, tiny_tokenizer, identity_of(decoder), precision).train_dataset[range(SAMPLES)]
        for precision in (None, "float32")
    )
    assert decoder.are_moments(cached.targets) and not decoder.are_moments(pixels.targets)
    assert cached.report.samples == pixels.report.samples
    assert torch.equal(cached.prompt.ids, pixels.prompt.ids)
    torch.testing.assert_close(cached.targets, decoder.moments(pixels.targets), rtol=1e-5, atol=1e-5)
    noise = torch.randn(SAMPLES, 4, tiny.LATENT_SIZE, tiny.LATENT_SIZE)
    ours, online = decoder.latents(cached.targets, noise), decoder.latents(pixels.targets, noise)
    torch.testing.assert_close(ours, online, rtol=1e-5, atol=1e-5)


def test_what_is_done_or_under_way_is_skipped(shards: str, settings: CachedLatentsConfig) -> None:
    with open(shards.replace("*", "000001"), "rb") as shard:
        fcntl.flock(shard, fcntl.LOCK_EX)  # another writer encodes it
        assert write_latents(settings) == {"written": 1, "skipped": 1, "samples": 3, "unusable": 0}
    assert write_latents(settings) == {"written": 1, "skipped": 1, "samples": 2, "unusable": 0}
    assert write_latents(settings) == {"skipped": 2}


def test_latents_of_another_vae_crop_or_precision_are_refused(
    shards: str, settings: CachedLatentsConfig, decoder: ImageDecoder, tiny_tokenizer: Path
) -> None:
    write_latents(settings)
    own, other = identity_of(decoder), AutoencoderKL.from_config(decoder.autoencoder.config)
    another = latents_identity(other, TargetTransform(tiny.IMAGE_SIZE), "float32")
    for identity in (another, identity_of(decoder, size=32), identity_of(decoder, "float16")):
        assert identity != own
        with pytest.raises(ShardError, match=rf"no cached latents of this VAE.*beside it: .*latents-{own[:8]}"):
            data(shards, tiny_tokenizer, identity)


def test_latents_of_other_samples_are_refused_and_written_anew(
    shards: str, settings: CachedLatentsConfig, decoder: ImageDecoder, tiny_tokenizer: Path
) -> None:
    identity = identity_of(decoder)
    write_latents(settings)
    (_, first, _), (_, second, _) = latents_files(list_shards(shards), identity)
    for content in (second.read_bytes(), b"damaged"):
        first.write_bytes(content)
        with pytest.raises(ShardError, match="of its present samples"):
            data(shards, tiny_tokenizer, identity)
    assert write_latents(settings)["written"] == 1
    data(shards, tiny_tokenizer, identity)


def test_unusable_samples_and_shards_cost_no_others(
    tmp_path: Path, settings: CachedLatentsConfig, decoder: ImageDecoder, tiny_tokenizer: Path
) -> None:
    settings.shards, settings.precision = str(tmp_path / "set"), "float16"
    with ShardWriter(settings.shards, "train", samples_per_shard=2) as writer:
        for key in ("good", "bad", "lost1", "lost2", "good2"):
            sample = EditSample("a fish", "make it night", picture(0), picture(1), key=key)
            if key == "bad":
                members = sample.encode() | {"target.png": b"no image"}
                sample.encode = lambda members=members: members  # type: ignore[method-assign]
            writer.write(sample)
    lost = tmp_path / "set" / "train-000001.tar"
    lost.write_bytes(bytes(lost.stat().st_size))
    with pytest.raises(DataError, match=r"1 shards have no cached latents \(written: 2\).*train-000001"):
        write_latents(settings)
    identity = identity_of(decoder, "float16")
    with pytest.raises(ShardError, match=r"train-000001\.tar' has no cached latents"):
        data(settings.shards, tiny_tokenizer, identity, "float16")
    module = data(f"{tmp_path}/set/train-00000[02].tar", tiny_tokenizer, identity, "float16")
    batch = module.train_dataset[range(3)]
    assert {name.rpartition("/")[2] for name in batch.report.samples} == {"good", "good2"}
    assert {error.reason for error in batch.report.errors} == {"unreadable_image"}
    assert batch.targets.dtype == torch.float32


def test_the_command_says_what_it_did(
    settings: CachedLatentsConfig, capsys: pytest.CaptureFixture, tiny_stable_diffusion: Path
) -> None:
    arguments = [f"shards={settings.shards}", f"image_decoder={tiny_stable_diffusion}", "image_size=64"]
    assert main(arguments) == 0
    assert f"2 shards written, 0 skipped (finished, or another process is at them); {SAMPLES} samples, 0 unusable" in (
        capsys.readouterr().out
    )
    assert main(["shards=/nowhere/*.tar", *arguments[1:]]) == 2
    assert "no shard at" in capsys.readouterr().err


def test_samples_of_several_targets_are_refused(tmp_path: Path, settings: CachedLatentsConfig) -> None:
    with ShardWriter(tmp_path / "pairs", "train") as writer:
        sample = EditSample("a fish", "make it night", picture(0), picture(1), more=[(picture(2), picture(3))])
        writer.write(sample)
    settings.shards = str(tmp_path / "pairs")
    with pytest.raises(DataError, match=r"2 target images.*pairs=apart"):
        write_latents(settings)


def test_an_empty_shard_needs_no_latents(
    shards: str, settings: CachedLatentsConfig, decoder: ImageDecoder, tiny_tokenizer: Path
) -> None:
    (Path(shards).parent / "train-000009.tar").write_bytes(bytes(tarfile.RECORDSIZE))
    assert kosmosg(["data", "index", str(Path(shards).parent)]) == 0
    assert write_latents(settings) == {"written": 2, "samples": SAMPLES, "unusable": 0}
    batch = data(shards, tiny_tokenizer, identity_of(decoder)).train_dataset[range(SAMPLES)]
    assert decoder.are_moments(batch.targets)
