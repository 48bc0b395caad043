"""Cached latents: the VAE's moments of the target images, computed once, so that stage 3 encodes nothing.

    python -m datamodules.cached_latents shards=data/constructed \\
        image_decoder=stable-diffusion-v1-5/stable-diffusion-v1-5 image_size=512

Then data.cached_latents=float32 reads them. `<shard>.latents-<hash>.safetensors` beside each shard holds row n for
sample n; the hash is of the VAE, the crop and the precision. Means and log-variances are kept, 131 kB for 512 px, or
half of it with precision=float16; the posterior is still sampled in every step. Resumable: finished shards are skipped.
Commands that run at the same time share the shards of a set.
"""

import fcntl
import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import torch
from diffusers import AutoencoderKL
from omegaconf import MISSING
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from datamodules.errors import DataError, SampleError, ShardError
from datamodules.images import Limits, load
from datamodules.sample import CaptionSample, EditSample, decode
from datamodules.shards import ShardList, list_shards
from datamodules.tar import read_shard
from kosmosg.config import ConfigError, load_config
from kosmosg.files import replaced
from kosmosg.image_processing import TargetTransform
from kosmosg.models.build import load_image_decoder
from kosmosg.models.image_decoder import ImageDecoder

logger = logging.getLogger(__name__)

MOMENTS, KNOWN = "moments", "known"
OPEN_FILES = 256


@dataclass
class CachedLatentsConfig:
    shards: str = MISSING
    """Folder, path, glob, brace list or shards.json of local shards of stage 3."""
    image_decoder: str = MISSING
    """Stable Diffusion folder or hub id, as model.image_decoder."""
    image_size: int = 512
    """Side of the targets in pixels, as model.image_size."""
    precision: Literal["float32", "float16"] = "float32"
    """Of what is kept, as data.cached_latents; with float16 means are rounded to 11 bits."""
    batch_size: int = 8
    """Images encoded at once."""
    limits: Limits = field(default_factory=Limits)
    """What one sample may cost, as data.limits."""

    def __post_init__(self) -> None:
        for name in ("image_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be at least 1.")


class CachedLatents:
    """The cached latents of some shards, read row by row. Safe to share with forked and spawned workers.

    Args:
        identity: see `latents_identity`.

    Raises:
        ShardError: a shard has none, or those of other samples; says which command writes them.
    """

    def __init__(self, shards: ShardList, identity: str):
        self.files = []
        for path, file, header in latents_files(shards, identity):
            if int(header["samples"]) and read_header(file) != header:
                others = sorted(other.name for other in path.parent.glob(f"{path.name}.latents-*"))
                raise ShardError(
                    f"'{path}' has no cached latents of this VAE, crop and precision and of its present samples; "
                    f"beside it: {', '.join(others) or 'none'}. Write them with: python -m datamodules.cached_latents "
                    "shards=… image_decoder=… image_size=… precision=…, or set data.cached_latents=null."
                )
            self.files.append(str(file))

    def __call__(self, shard: int, row: int) -> Tensor | None:
        """Moments 2c×h×h, float32, of sample `row` of a shard; None where its image could not be read."""
        file = _open(self.files[shard])
        known = file.get_slice(KNOWN)[row : row + 1].item()
        return file.get_slice(MOMENTS)[row : row + 1][0].float() if known else None


@lru_cache(OPEN_FILES)
def _open(file: str) -> Any:
    return safe_open(file, "pt")


def latents_identity(vae: AutoencoderKL, transform: TargetTransform, precision: str) -> str:
    """Hash of what cached latents depend on beside the image: settings and weights of the VAE, crop, precision."""
    digest = hashlib.sha256(json.dumps([transform.size, precision]).encode())
    settings = {name: value for name, value in sorted(vae.config.items()) if not name.startswith("_")}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()


def latents_files(shards: ShardList, identity: str) -> list[tuple[Path, Path, dict[str, str]]]:
    """Each shard, its file of cached latents, and what that says of itself."""
    return [
        (
            path,
            path.with_name(f"{path.name}.latents-{identity[:8]}.safetensors"),
            {"identity": identity, "shard": path.name, "samples": str(samples), "bytes": str(size), "sha256": sha256},
        )
        for path, samples, size, sha256 in zip(
            shards.paths, shards.samples, shards.bytes, shards.checksums, strict=True
        )
    ]


def read_header(file: Path) -> dict[str, str] | None:
    """What a file says of itself; None if it is absent or damaged."""
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata()
    except (SafetensorError, FileNotFoundError):
        return None


def write_latents(config: CachedLatentsConfig) -> Counter[str]:
    """Write the file of every shard that has none and that no other process works on.

    Returns:
        counts of shards `written` and `skipped`, of `samples` and of those `unusable`.

    Raises:
        DataError: no shards; or some could not be encoded, after all others were.
    """
    decoder, transform = load_image_decoder(config.image_decoder, "images"), TargetTransform(config.image_size)
    identity = latents_identity(decoder.autoencoder, transform, config.precision)
    decoder.to("cuda" if torch.cuda.is_available() else "cpu")
    counts, failed = Counter(), []
    for path, file, header in track(latents_files(list_shards(config.shards), identity), "shards"):
        if not int(header["samples"]):
            continue
        with open(path, "rb") as shard:
            if not _lock(shard) or read_header(file) == header:
                counts["skipped"] += 1
                continue
            try:
                rows = encode(path, int(header["samples"]), decoder, transform, config)
            except DataError as error:
                failed.append(str(error))
                continue
            with replaced(file) as temporary:
                save_file(rows, temporary, header)
        counts.update(written=1, samples=len(rows[KNOWN]), unusable=int((~rows[KNOWN]).sum()))
    if failed:
        raise DataError(f"{len(failed)} shards have no cached latents (written: {counts['written']}). {failed[0]}")
    return counts


def _lock(shard: IO) -> bool:
    """Whether no other process works on a shard; where the file system has no locks, two may do the same work."""
    try:
        fcntl.flock(shard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)
    return True


def encode(
    path: Path, size: int, decoder: ImageDecoder, transform: TargetTransform, config: CachedLatentsConfig
) -> dict[str, Tensor]:
    """Moments N×2c×h×h of the N = `size` samples of a shard, and whether the image of each could be read, N.

    Raises:
        DataError: none of them could, or a sample has several targets: there is one row for each sample.
    """
    moments, known = None, torch.zeros(size, dtype=torch.bool)
    device, targets = next(decoder.autoencoder.parameters()).device, _targets(path, size, transform, config.limits)
    while batch := list(islice(targets, config.batch_size)):
        values = decoder.moments(torch.stack([target for _, target in batch]).to(device))
        if moments is None:
            moments = torch.zeros(size, *values.shape[1:], dtype=getattr(torch, config.precision))
        rows = [row for row, _ in batch]
        moments[rows], known[rows] = values.to(moments), True
    if moments is None:
        raise DataError(f"'{path}' holds no target image that can be read.")
    return {MOMENTS: moments, KNOWN: known}


def _targets(path: Path, size: int, transform: TargetTransform, limits: Limits) -> Iterator[tuple[int, Tensor]]:
    """Number and target 3×S×S of each usable sample of a shard."""
    for row, read in enumerate(islice(read_shard(path, limits), size)):
        try:
            if isinstance(read, SampleError):
                raise read
            key, members = read
            sample = decode(members, path.name, key, limits=limits)
            if isinstance(sample, EditSample) and sample.more:
                raise DataError(
                    f"{path.name}, sample '{key}' has {len(sample.pairs)} target images, and only one of a sample can "
                    "be cached; convert the set with pairs=apart, or set data.cached_latents=null."
                )
            image = sample.image if isinstance(sample, CaptionSample) else getattr(sample, "target", None)
            if image is None:
                detail = f"a sample of kind '{sample.kind}' has no target image"
                raise SampleError("missing_member", path.name, key, detail)
            target = transform(load(image))
        except SampleError as error:
            logger.warning("%s", error)  # the reader of the shards comes upon it, and counts it
            continue
        yield row, target


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 written, 2 a mistake in the arguments or the data, 130 after Ctrl-C."""
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return 0 if arguments else 2
    try:
        counts = write_latents(load_config(arguments, CachedLatentsConfig))
    except (ConfigError, DataError, OSError) as error:
        print(f"datamodules.cached_latents: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. The same command continues with the shard it was at.", file=sys.stderr)
        return 130
    print(
        f"{counts['written']} shards written, {counts['skipped']} skipped (finished, or another process is at them); "
        f"{counts['samples']} samples, {counts['unusable']} unusable."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
