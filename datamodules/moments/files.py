"""One file of moments beside each shard: `<shard>.moments-<hash>.safetensors`, row n being that of sample n.

The hash is of the VAE's weights, of the crop and of the precision, so that moments of another VAE or crop are never
read by mistake. The posterior is still sampled in every step: what is kept are its means and log-variances.

Shapes: `N` samples of a shard, `c` latent channels, `h` latent pixels.
"""

import hashlib
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch import Tensor

from datamodules.errors import ShardError
from kosmosg.image_processing import TargetTransform

MOMENTS, KNOWN = "moments", "known"
VERSION = 1
HASH_DIGITS = 8
OPEN_FILES = 64
PRECISIONS = {"float32": torch.float32, "float16": torch.float16}


def moments_identity(vae: AutoencoderKL, transform: TargetTransform) -> str:
    """Hash of what moments depend on beside the image: the VAE's settings and weights, the crop."""
    digest = hashlib.sha256(json.dumps([VERSION, transform.size], sort_keys=True).encode())
    settings = {name: value for name, value in sorted(vae.config.items()) if not name.startswith("_")}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()


def moments_file(shard: Path, identity: str) -> Path:
    """Where the moments of a shard lie."""
    return shard.with_name(f"{shard.name}.moments-{identity[:HASH_DIGITS]}.safetensors")


def header(identity: str, content: str, samples: int) -> dict[str, str]:
    """What a file says about itself."""
    return {"identity": identity, "content": content, "samples": str(samples), "version": str(VERSION)}


class KeptMoments:
    """The moments beside some shards, read row by row. Safe to share with forked and spawned workers.

    Args:
        paths, contents: the shards and a hash of what each holds, see `IndexedShards.contents`.
        identity: see `moments_identity`.

    Raises:
        ShardError: no moments beside a shard, or those of other samples; says which command writes them.
    """

    def __init__(self, paths: list[Path], contents: list[str], sizes: list[int], identity: str):
        self.files = [moments_file(path, identity) for path in paths]
        self._open: OrderedDict[int, Any] = OrderedDict()
        for path, file, content, size in zip(paths, self.files, contents, sizes, strict=True):
            if not file.is_file():
                raise ShardError(f"there are no moments of '{path}' for this VAE and crop{_others(path)}. {COMMAND}")
            try:
                with safe_open(file, "pt") as opened:
                    found = opened.metadata()
            except SafetensorError as error:
                raise ShardError(f"'{file}' cannot be read ({error}); remove it. {COMMAND}") from error
            if found != header(identity, content, size):
                raise ShardError(f"'{file}' holds moments of other samples than '{path}'; remove it. {COMMAND}")

    def __call__(self, number: int, row: int) -> Tensor | None:
        """Moments 2c×h×h, float32, of sample `row` of shard `number`; None where its image could not be read."""
        if number not in self._open:
            while len(self._open) >= OPEN_FILES:
                self._open.popitem(last=False)
            self._open[number] = safe_open(self.files[number], "pt").__enter__()
        self._open.move_to_end(number)
        opened = self._open[number]
        if not bool(opened.get_slice(KNOWN)[row : row + 1].item()):
            return None
        return opened.get_slice(MOMENTS)[row : row + 1][0].float()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": OrderedDict()}


COMMAND = (
    "Write them with: python -m datamodules.moments shards='…' image_decoder=… image_size=…, or set "
    "data.kept_moments=false."
)


def _others(path: Path) -> str:
    others = sorted(file.name for file in path.parent.glob(f"{path.name}.moments-*.safetensors"))
    return f"; beside it lie those of another: {', '.join(others)}" if others else ""
