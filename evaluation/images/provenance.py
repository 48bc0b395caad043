"""Locate weights, hash everything that results depend on, and describe the environment."""

import hashlib
import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from kosmosg.generation import file_hash
from kosmosg.models.build import image_decoder_class

CHUNK = 1 << 20
PACKAGES = ("torch", "diffusers", "transformers", "torchmetrics", "pillow", "numpy")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
ENCODER_FILES = ("*.json", "*.txt", "*.jinja", "*.safetensors", "*.bin")
REPOSITORY = Path(__file__).resolve().parents[2]


def hash_files(folder: Path, files: Iterable[Path] | None = None) -> str:
    """Return one hash over the contents and relative names of `files`, by default all files under `folder`."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()) if files is None else sorted(files):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """Return a hash of plain values that does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def environment(device: torch.device) -> dict[str, str]:
    """Return command, versions, device and git revision."""
    return {
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git revision": git_revision(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
    }


def git_revision() -> str:
    """Return the commit, marked if the working tree is dirty; "unknown" outside this project's repository."""
    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != REPOSITORY:
            return "unknown"
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def git(*arguments: str) -> str:
    answer = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=10)
    return answer.stdout.strip()


def decoder_folder(weights: str) -> Path:
    """Return the folder of an image decoder, downloading a hub id.

    Raises:
        FileNotFoundError: the folder or one of its parts is missing.
        ValueError: the pipeline is not a supported image decoder.
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
    """Return the subfolders of an image decoder that generated images depend on."""
    return (*image_decoder_class(decoder).networks, "scheduler")


def encoder_path(weights: str, revision: str | None = None) -> Path:
    """Return the weight file or transformers folder of an encoder, downloading a hub id.

    Raises:
        FileNotFoundError: `weights` is none of these.
    """
    path = Path(weights)
    if path.is_file() or (path / "config.json").is_file():
        return path
    if path.is_dir() or not HUB_ID.fullmatch(weights):
        raise FileNotFoundError(
            f"'{weights}' is not an encoder: neither a weight file, nor a folder with a config.json, nor a hub id. Set "
            f"local_weights={{{weights}: /path/to/file}}."
        )
    return Path(snapshot_download(weights, revision=revision, allow_patterns=list(ENCODER_FILES)))


def hash_encoder(path: Path) -> str:
    """Return the hash of an encoder: of a folder's relevant files, or the SHA-256 of a file whatever its name."""
    if path.is_dir():
        return hash_files(path, (file for pattern in ENCODER_FILES for file in path.rglob(pattern)))
    return file_hash(path)


def hash_parts(folder: Path, parts: tuple[str, ...]) -> str:
    """Return the hash of the files in some subfolders."""
    return hash_files(folder, [path for part in parts for path in (folder / part).rglob("*") if path.is_file()])
