"""Caches on disk: what was encoded of each item, of these samples and settings alone, however often the making was
stopped."""

import fcntl
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from datamodules.cache import Cache, cache_files, write_cache
from datamodules.errors import DataError, ShardError
from datamodules.images import Limits
from datamodules.instruction import InstructionData, InstructionDataConfig
from datamodules.sample import EditSample
from datamodules.shards import list_shards
from kosmosg.cli import main as kosmosg
from kosmosg.image_processing import TargetTransform
from tests.datamodules import worlds

IDENTITY = {"cache": "latents", "network": "a" * 64, "images": "16×16", "precision": "float32"}


def encode(images: Sequence[Image.Image]) -> list[dict[str, Tensor]]:
    """Of another shape for every image, and a whole number beside it."""
    return [
        {"pixels": torch.full((2, image.width), float(image.getpixel((0, 0))[0])), "width": torch.tensor([image.width])}
        for image in images
    ]


def pairs(sample: EditSample) -> list[Any]:
    return [target.load for _, target in sample.pairs]


def edits(folder: Path, samples: int = 5, bad: Sequence[int] = (), per_shard: int = 2) -> str:
    """Sample i has the targets i + 10 and, if i is even, i + 30, which is wider."""
    found = []
    for i in range(samples):
        more = [(worlds.image(i), worlds.image(i + 30, side=20))] if i % 2 == 0 else []
        sample = EditSample("a fish", "make it night", worlds.image(i), worlds.image(i + 10), key=f"e{i}", more=more)
        if i in bad:
            members = sample.encode() | {"target.png": b"no image"}
            sample.encode = lambda members=members: members  # type: ignore[method-assign]
        found.append(sample)
    return worlds.write(folder, "train", found, per_shard)


def write(pattern: str, identity: dict[str, str] = IDENTITY, encode: Any = encode, rows: int = 3) -> dict[str, int]:
    return dict(write_cache(list_shards(pattern), identity, pairs, encode, rows, Limits()))  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_each_item_of_each_sample_is_read_as_it_was_encoded(tmp_path: Path, precision: str) -> None:
    pattern, identity = edits(tmp_path), IDENTITY | {"precision": precision}
    assert write(pattern, identity) == {"written": 3, "items": 8, "unusable": 0}
    cache = Cache(list_shards(pattern), identity)
    for sample in range(5):
        shard, row = divmod(sample, 2)
        for item, (level, side) in enumerate([(sample + 10, worlds.SIDE), (sample + 30, 20)][: 2 - sample % 2]):
            found = cache(shard, row, item)
            assert found is not None and found["pixels"].dtype == torch.float32
            assert torch.equal(found["pixels"], torch.full((2, side), float(level)))
            assert found["width"].tolist() == [side]
        assert cache(shard, row, 2 - sample % 2) is None


class Killed:
    """Encodes so many batches; the next one ends the process."""

    def __init__(self, after: int):
        self.after = after

    def __call__(self, images: Sequence[Image.Image]) -> list[dict[str, Tensor]]:
        self.after -= 1
        return encode(images) if self.after >= 0 else os._exit(9)


def test_a_killed_writing_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """Killed in each shard in turn: shards that were written stand, and no other file is left."""
    whole, killed = edits(tmp_path / "whole"), edits(tmp_path / "killed")
    write(whole)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    for shard in range(3):
        if (child := os.fork()) == 0:
            write(killed, encode=Killed(after=shard < 2))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == sorted(
            [name for name in names if "latents" not in name]
            + [name for name in names if "latents" in name][: min(shard + 1, 2)]
        )
    assert write(killed) == {"written": 1, "skipped": 2, "items": 2, "unusable": 0}
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_what_is_done_or_under_way_is_skipped(tmp_path: Path) -> None:
    pattern = edits(tmp_path, samples=4)
    with open(pattern.replace("*", "000001"), "rb") as shard:
        fcntl.flock(shard, fcntl.LOCK_EX)  # another writer is at it
        assert write(pattern) == {"written": 1, "skipped": 1, "items": 3, "unusable": 0}
    assert write(pattern) == {"written": 1, "skipped": 1, "items": 3, "unusable": 0}
    assert write(pattern) == {"skipped": 2}


def test_what_a_cache_is_not_of_is_named_with_what_was_wanted(tmp_path: Path) -> None:
    pattern = edits(tmp_path)
    with pytest.raises(ShardError, match=r"no cache 'latents'.*The shard has none.*train\.py cache"):
        Cache(list_shards(pattern), IDENTITY)
    write(pattern)
    for key, value in (("network", "b" * 64), ("images", "32×32"), ("precision", "float16")):
        with pytest.raises(ShardError, match=rf"{key} is {IDENTITY[key][:40]} there and {value[:40]} here\."):
            Cache(list_shards(pattern), IDENTITY | {key: value})


def test_a_cache_of_other_samples_is_refused_and_written_anew(tmp_path: Path) -> None:
    pattern = edits(tmp_path)
    write(pattern)
    (_, first, _), (_, second, _), _ = cache_files(list_shards(pattern), IDENTITY)
    for content, told in ((second.read_bytes(), "shard is train-000001.tar there"), (b"damaged", "is damaged")):
        first.write_bytes(content)
        with pytest.raises(ShardError, match=told):
            Cache(list_shards(pattern), IDENTITY)
    assert write(pattern)["written"] == 1
    Cache(list_shards(pattern), IDENTITY)


def test_unusable_items_and_shards_cost_no_others(tmp_path: Path) -> None:
    """An image that is none, a value beyond float16, and a shard of zeros, which has no cache."""
    pattern, identity = edits(tmp_path, samples=8, bad=[0], per_shard=4), IDENTITY | {"precision": "float16"}

    def large(images: Sequence[Image.Image]) -> list[dict[str, Tensor]]:
        found = encode(images)
        for values in found:
            if values["pixels"][0, 0] == 11:
                values["pixels"] *= 1e5
        return found

    lost = tmp_path / "train-000001.tar"
    lost.write_bytes(bytes(lost.stat().st_size))
    with pytest.raises(DataError, match=r"1 shards have no cache \(written: 1\).*train-000001"):
        write(pattern, identity, large)
    cache = Cache(list_shards(str(tmp_path / "train-000000.tar")), identity)
    found = [[cache(0, sample, item) is not None for item in range(2)] for sample in range(4)]
    assert found == [[False, True], [False, False], [True, True], [True, False]]


def test_an_empty_shard_needs_no_cache(tmp_path: Path) -> None:
    pattern = edits(tmp_path)
    (tmp_path / "train-000009.tar").write_bytes(bytes(tarfile.RECORDSIZE))
    assert kosmosg(["data", "index", str(tmp_path)]) == 0
    assert write(pattern)["written"] == 3
    Cache(list_shards(pattern), IDENTITY)


def test_stage_3_reads_the_pair_that_it_draws_and_says_why_one_is_missing(tmp_path: Path, tiny_tokenizer: Path) -> None:
    """The same samples with and without; a target that could not be cached is dropped for what is wrong with it."""
    pattern = edits(tmp_path, bad=[1])
    config = InstructionDataConfig(cached_latents="float32", micro_batch_size=16)
    config.edit.shards = pattern
    encoder, transform = worlds.encoder(tiny_tokenizer), TargetTransform(worlds.SIDE)
    pixels = InstructionData(InstructionDataConfig(edit=config.edit), encoder, transform)
    module = InstructionData(config, encoder, transform)
    module.networks = {"latents": {"network": "a" * 64}}

    def mean(images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [{"moments": image.mean(dim=(1, 2), keepdim=True)} for image in images]

    assert module.write_cache("latents", mean)["unusable"] == 1
    for one in (module, pixels):
        one.setup()
    ours, theirs = (one.train_dataset[range(16)] for one in (module, pixels))
    assert ours.report.samples == theirs.report.samples and len(set(ours.report.samples)) == 4
    assert {error.reason for error in ours.report.errors} == {"unreadable_image"}
    assert torch.equal(ours.targets, theirs.targets.mean(dim=(2, 3), keepdim=True))
