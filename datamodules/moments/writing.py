"""Encoding the target image of every sample of some shards; see datamodules/moments/files.py for what is written."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from omegaconf import MISSING
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save
from torch import Tensor

from datamodules.errors import DataError, SampleError
from datamodules.images import Limits, SampleImage, load
from datamodules.moments.files import KNOWN, MOMENTS, PRECISIONS, header, moments_file, moments_identity
from datamodules.sample import CaptionSample, ConstructedSample, EditSample, decode
from datamodules.storage.indexed_shards import IndexedShards
from kosmosg.files import write_bytes
from kosmosg.image_processing import TargetTransform
from kosmosg.models.build import load_image_decoder
from kosmosg.models.image_decoder import ImageDecoder

logger = logging.getLogger(__name__)


@dataclass
class MomentsConfig:
    shards: str = MISSING
    """Path, glob or brace list of shards of stage 3: constructed, edit or caption samples."""
    image_decoder: str = MISSING
    """Stable Diffusion folder or hub id, as model.image_decoder."""
    image_size: int = 512
    """Side of the targets in pixels, as model.image_size."""
    precision: Literal["float32", "float16"] = "float32"
    """Of what is kept; with float16 means are rounded to 11 bits."""
    batch_size: int = 8
    """Images encoded at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""
    limits: Limits = field(default_factory=Limits)
    """What one sample may cost, as data.limits."""

    def __post_init__(self) -> None:
        for name in ("image_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be at least 1.")


@dataclass
class Counts:
    """What was done."""

    shards: int = 0
    there: int = 0
    samples: int = 0
    bad: int = 0


def write_moments(config: MomentsConfig) -> Counts:
    """Write the file of every shard that has none.

    Raises:
        DataError: no shards, or a shard without a usable target image.
    """
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if config.device == "auto" else config.device)
    decoder, transform = load_image_decoder(config.image_decoder, "images"), TargetTransform(config.image_size)
    identity = moments_identity(decoder.autoencoder, transform)
    decoder.to(device)
    shards, counts = IndexedShards(config.shards, config.limits), Counts()
    first = 0
    for path, content, size in zip(shards.paths, shards.contents, shards.sizes, strict=True):
        file = moments_file(path, identity)
        if file.is_file():
            counts.there += 1
        else:
            rows = encode(shards, range(first, first + size), decoder, transform, config, path)
            counts.bad += size - int(rows[KNOWN].sum())
            counts.shards, counts.samples = counts.shards + 1, counts.samples + size
            write_bytes(file, save(rows, header(identity, content, size)))
        first += size
    return counts


def encode(
    shards: IndexedShards,
    samples: range,
    decoder: ImageDecoder,
    transform: TargetTransform,
    config: MomentsConfig,
    path: Path,
) -> dict[str, Tensor]:
    """Moments N×2c×h×h of one shard, and for each whether its image could be read, N.

    Raises:
        DataError: none of them could.
    """
    moments: Tensor | None = None
    known = torch.zeros(len(samples), dtype=torch.bool)
    device = next(decoder.autoencoder.parameters()).device
    waiting: list[tuple[int, Tensor]] = []

    def flush() -> None:
        nonlocal moments
        if not waiting:
            return
        found = decoder.moments(torch.stack([image for _, image in waiting]).to(device))
        if moments is None:
            moments = torch.zeros(len(samples), *found.shape[1:], dtype=PRECISIONS[config.precision])
        for (row, _), values in zip(waiting, found, strict=True):
            moments[row], known[row] = values.to(moments.dtype), True
        waiting.clear()

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        for row, number in enumerate(progress.track(samples, description=path.name)):
            try:
                waiting.append((row, transform(load(target_image(shards, number, config.limits)))))
            except SampleError as error:
                logger.warning("%s", error)  # the reader of the shards comes upon it, and counts it
            if len(waiting) == config.batch_size:
                flush()
        flush()
    if moments is None:
        raise DataError(f"'{path}' holds no target image that can be read.")
    return {MOMENTS: moments, KNOWN: known}


def target_image(shards: IndexedShards, number: int, limits: Limits) -> SampleImage:
    """The image that stage 3 learns to make of a sample.

    Raises:
        SampleError: it has none.
        DataError: it has several, of which training draws one; a file of moments holds one for each sample.
    """
    shard, key, members = shards.read(number)
    sample = decode(members, shard, key, limits=limits)
    if isinstance(sample, EditSample) and sample.more:
        raise DataError(
            f"{shard}, sample '{key}' has {len(sample.pairs)} target images, and only one can be kept for a sample; "
            "convert the set with pairs=apart, or set data.kept_moments=false."
        )
    if isinstance(sample, ConstructedSample | EditSample):
        return sample.target
    if isinstance(sample, CaptionSample) and sample.image is not None:
        return sample.image
    raise SampleError("missing_member", shard, key, f"a sample of kind '{sample.kind}' has no target image")
