"""Where a number comes from: hashes of files, versions, the git revision, the command."""

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

CHUNK = 1 << 20
PACKAGES = ("torch", "diffusers", "transformers", "torchmetrics", "pillow", "numpy")
REPOSITORY = Path(__file__).resolve().parents[2]


def hash_files(folder: Path, files: Iterable[Path] | None = None) -> str:
    """One hash over names relative to `folder` and contents; of all files under it, unless they are given."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()) if files is None else sorted(files):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """Hash of plain values, the same whatever the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def environment(device: torch.device) -> dict[str, str]:
    """Versions, device and revision, for the report."""
    return {
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git revision": git_revision(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "device": f"CPU, {torch.get_num_threads()} threads"
        if device.type == "cpu"
        else torch.cuda.get_device_name(device),
    }


def git_revision() -> str:
    """The commit, marked where the working tree differs from it; "unknown" outside a repository of this project."""
    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != REPOSITORY:
            return "unknown"
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def git(*arguments: str) -> str:
    answer = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=10)
    return answer.stdout.strip()
