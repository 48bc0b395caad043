"""Where weights lie: a folder, or the local snapshot of a hub id; and the hash of what lies there."""

import hashlib
import re
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from evaluation.images.provenance import hash_files
from kosmosg.models.build import image_decoder_class

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
ENCODER_FILES = ("*.json", "*.txt", "*.jinja", "*.safetensors", "*.bin")


def decoder_folder(weights: str) -> Path:
    """An image decoder's folder or hub id as a folder.

    Raises:
        FileNotFoundError: no such folder, or a part is missing there.
        ValueError: a pipeline that is no image decoder here.
    """
    folder = Path(weights)
    if not folder.is_dir():
        if not HUB_ID.fullmatch(weights):
            raise FileNotFoundError(f"models.image_decoder: there is no folder '{weights}'.")
        folder = Path(DiffusionPipeline.download(weights))
    kind = image_decoder_class(folder)
    for part in image_parts(folder) + kind.text_parts():
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"models.image_decoder: '{folder}' is no {kind.title}: {part}/ is missing.")
    return folder


def image_parts(decoder: Path) -> tuple[str, ...]:
    """What of an image decoder's folder draws."""
    return (*image_decoder_class(decoder).networks, "scheduler")


def encoder_folder(weights: str, revision: str | None = None) -> Path:
    """A transformers folder or hub id as a folder.

    Raises:
        FileNotFoundError: no such folder.
    """
    folder = Path(weights)
    if (folder / "config.json").is_file():
        return folder
    if folder.is_dir() or not HUB_ID.fullmatch(weights):
        raise FileNotFoundError(
            f"'{weights}' holds no encoder: config.json is missing. Give a transformers folder or hub id."
        )
    return Path(snapshot_download(weights, revision=revision, allow_patterns=list(ENCODER_FILES)))


def encoder_file(weights: str) -> Path:
    """The weight file of a network that is not of transformers.

    Raises:
        FileNotFoundError: no such file.
    """
    if not Path(weights).is_file():
        raise FileNotFoundError(
            f"there is no weight file '{weights}'; download it, and tell where it lies by "
            f"local_weights={{{weights}: /path/to/file}}."
        )
    return Path(weights)


def hash_encoder(path: Path) -> str:
    """Of a folder, over names and contents of the files of an encoder; of a file, its SHA-256, whatever its name."""
    if path.is_dir():
        return hash_files(path, (file for pattern in ENCODER_FILES for file in path.rglob(pattern)))
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_parts(folder: Path, parts: tuple[str, ...]) -> str:
    """Hash of the files in some subfolders."""
    return hash_files(folder, [path for part in parts for path in (folder / part).rglob("*") if path.is_file()])
