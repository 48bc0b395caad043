"""Shrink model folders and restore them.

`int8` stores each row of a matrix as integers with a scale, 1/127 of its largest absolute value. With a base model,
weights that are bit-equal to the base are omitted. `packed.json` holds what restoring needs.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kosmosg.files import write_json
from kosmosg.models.storage import find_model, fingerprint, is_finite

PACKED, SCALE, LEVELS = "packed.json", "::scale", 127
DTYPES = ("float32", "float16", "bfloat16", "int8")
COPIED = (".json", ".txt", ".model", ".py", ".jinja")  # other files, such as pickles, are not copied


def pack(model: Path, folder: Path, dtype: str | None = None, base: str | None = None) -> None:
    """Copy a model folder with smaller weights.

    Args:
        dtype: one of `DTYPES`; None keeps the dtype of each weight.
        base: folder or hub id of the base model.

    Raises:
        ValueError: the dtype is not allowed, or a weight overflows it.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={dtype!r} is not allowed; allowed: {', '.join(DTYPES)}.")
    omitted: dict[str, list[str]] = {}
    for file in sorted(file for file in model.rglob("*") if file.is_file() and not file.name.startswith(".")):
        name = file.relative_to(model)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if file.suffix in COPIED:
            shutil.copyfile(file, folder / name)
        elif file.suffix == ".safetensors":
            base_weights = {} if base is None else weight_files(local_model(base) / name.parent)
            stored: dict[str, Tensor] = {}
            with safe_open(file, "pt") as opened:
                for key in weight_files(file):
                    tensor = opened.get_tensor(key)
                    if key in base_weights and same(tensor, read_weight(base_weights[key], key)):
                        omitted.setdefault(name.as_posix(), []).append(key)
                    else:
                        stored |= convert(key, tensor, dtype, file)
                save_file(stored, folder / name, opened.metadata())
    if dtype == "int8" or base is not None:
        parts = sorted({Path(file).parent.as_posix() for file in omitted})
        base_fingerprint = fingerprint(local_model(base), *parts) if base is not None and parts else None
        write_json(folder / PACKED, {"base": base, "base_fingerprint": base_fingerprint, "left_out": omitted})


def convert(key: str, tensor: Tensor, dtype: str | None, file: Path) -> dict[str, Tensor]:
    """Return the tensors to store for a weight. Raises ValueError if it overflows."""
    if dtype is None or not tensor.is_floating_point():
        return {key: tensor}
    if dtype == "int8" and tensor.dim() > 1:
        scale = tensor.float().flatten(1).abs().amax(1) / LEVELS
        rows = tensor.float() / scale.clamp(min=torch.finfo(torch.float32).tiny).view(-1, *[1] * (tensor.dim() - 1))
        return {key: rows.round().to(torch.int8), key + SCALE: scale}
    cast = tensor.to(torch.float16 if dtype == "int8" else getattr(torch, dtype))
    if not is_finite(cast):
        raise ValueError(f"'{file}': {key} has values outside the range of {cast.dtype}; use bfloat16.")
    return {key: cast}


@contextmanager
def unpacked(folder: Path) -> Iterator[Path]:
    """Restore a folder written by `pack` to a temporary folder; int8 matrices become float32.

    Raises:
        ValueError: `packed.json` or a scale is not as `pack` writes it, or the base model has changed.
    """
    record = read_record(folder)
    base = local_model(record["base"]) if record["left_out"] else None
    parts = sorted({Path(file).parent.as_posix() for file in record["left_out"]})
    if base is not None and fingerprint(base, *parts) != record["base_fingerprint"]:
        raise ValueError(f"'{folder}' was packed with the base '{record['base']}', which has changed since.")
    with tempfile.TemporaryDirectory(prefix="kosmosg-") as temporary:
        for file in (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != PACKED):
            name = file.relative_to(folder)
            (target := Path(temporary) / name).parent.mkdir(parents=True, exist_ok=True)
            if file.suffix != ".safetensors":
                shutil.copyfile(file, target)
                continue
            tensors: dict[str, Tensor] = {}
            names = weight_files(file)
            with safe_open(file, "pt") as opened:
                for key in (key for key in names if not key.endswith(SCALE)):
                    tensor = opened.get_tensor(key)
                    if key + SCALE in names:
                        tensor = rescaled(tensor, opened.get_tensor(key + SCALE), f"'{file}': {key}")
                    tensors[key] = tensor
                if base is not None and (omitted := record["left_out"].get(name.as_posix())):
                    base_weights = weight_files(base / name.parent)
                    if missing := [key for key in omitted if key not in base_weights]:
                        raise ValueError(
                            f"'{folder / PACKED}': left_out names {missing[0]!r} of '{name}'; allowed: the weights in "
                            f"'{base / name.parent}', such as {next(iter(base_weights), None)!r}."
                        )
                    tensors |= {key: read_weight(base_weights[key], key) for key in omitted}
                save_file(tensors, target, opened.metadata())
        try:
            yield Path(temporary)
        except (ValueError, FileNotFoundError) as error:  # name the packed folder in place of the temporary one
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(str(error).replace(temporary, str(folder))) from error


def read_record(folder: Path) -> dict[str, Any]:
    """Read `packed.json`. Raises ValueError: it is not as `pack` writes it; names the key."""
    file = folder / PACKED
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{file}' is not JSON: {error}.") from error
    found = record if isinstance(record, dict) else {}
    left_out = found.get("left_out")
    if not isinstance(left_out, dict) or not all(map(is_names, left_out.values())):
        raise ValueError(f"'{file}': left_out is {str(left_out)[:80]}; allowed: an object of lists of weights' names.")
    there = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))
    if unknown := sorted(left_out.keys() - set(there)):
        raise ValueError(f"'{file}': left_out has {unknown[0]!r}; allowed: {', '.join(there)}.")
    for key in ("base", "base_fingerprint"):
        if not isinstance(found.get(key), str if left_out else str | None):
            raise ValueError(f"'{file}': {key} is {str(found.get(key))[:80]}; allowed: text.")
    return found


def is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def rescaled(tensor: Tensor, scale: Tensor, name: str) -> Tensor:
    """Return an int8 matrix as float32. Raises ValueError: another dtype, or not one scale per row."""
    if tensor.dtype != torch.int8 or not tensor.dim() or scale.shape != tensor.shape[:1]:
        raise ValueError(
            f"{name} is {tensor.dtype} of {list(tensor.shape)} with scales {list(scale.shape)}; allowed: int8 and one "
            "scale for each row."
        )
    return tensor.float() * scale.view(-1, *[1] * (tensor.dim() - 1))


def local_model(base: str) -> Path:
    """Return the model folder of a folder or hub id, downloading it if needed."""
    return find_model(
        base if Path(base).is_dir() else snapshot_download(base, allow_patterns=["*.json", "*.safetensors"])
    )


def weight_files(part: Path) -> dict[str, Path]:
    """Return the file of each weight in a file or folder, by the weight's name."""
    files: dict[str, Path] = {}
    for file in [part] if part.is_file() else sorted(part.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            files |= dict.fromkeys(opened.keys(), file)
    return files


def read_weight(file: Path, key: str) -> Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(key)


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
