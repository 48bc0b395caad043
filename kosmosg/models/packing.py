"""Model folders made smaller, and whole again. By `int8` each row of a matrix is kept as whole numbers of 1/127 of its
largest value. Over a base, weights that are bit-equal there are left out. `packed.json` says how it is undone.
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
COPIED = (".json", ".txt", ".model", ".py", ".jinja")  # no pickles, nothing that is no part of a model


def pack(model: Path, folder: Path, dtype: str | None = None, base: str | None = None) -> None:
    """Copy a model folder.

    Args:
        dtype: of `DTYPES`; as it is if not given.
        base: folder or hub id of a model.

    Raises:
        ValueError: a dtype that is not allowed, or that does not hold a weight.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={dtype!r} is not allowed; allowed: {', '.join(DTYPES)}.")
    left_out: dict[str, list[str]] = {}
    for file in sorted(file for file in model.rglob("*") if file.is_file() and not file.name.startswith(".")):
        name = file.relative_to(model)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if file.suffix in COPIED:
            shutil.copyfile(file, folder / name)
        elif file.suffix == ".safetensors":
            there = {} if base is None else weights_of(located(base) / name.parent)
            kept: dict[str, Tensor] = {}
            with safe_open(file, "pt") as opened:
                for key in weights_of(file):
                    tensor = opened.get_tensor(key)
                    if key in there and same(tensor, weight(there[key], key)):
                        left_out.setdefault(name.as_posix(), []).append(key)
                    else:
                        kept |= stored_as(key, tensor, dtype, file)
                save_file(kept, folder / name, opened.metadata())
    if dtype == "int8" or base is not None:
        parts = sorted({Path(file).parent.as_posix() for file in left_out})
        known = fingerprint(located(base), *parts) if base is not None and parts else None
        write_json(folder / PACKED, {"base": base, "base_fingerprint": known, "left_out": left_out})


def stored_as(key: str, tensor: Tensor, dtype: str | None, file: Path) -> dict[str, Tensor]:
    """A weight in the form that is kept. Raises ValueError: it overflows."""
    if dtype is None or not tensor.is_floating_point():
        return {key: tensor}
    if dtype == "int8" and tensor.dim() > 1:
        scale = tensor.float().flatten(1).abs().amax(1) / LEVELS
        rows = tensor.float() / scale.clamp(min=torch.finfo(torch.float32).tiny).view(-1, *[1] * (tensor.dim() - 1))
        return {key: rows.round().to(torch.int8), key + SCALE: scale}
    cast = tensor.to(torch.float16 if dtype == "int8" else getattr(torch, dtype))
    if not is_finite(cast):
        raise ValueError(f"'{file}': {key} has values that {cast.dtype} does not hold; use bfloat16.")
    return {key: cast}


@contextmanager
def unpacked(folder: Path) -> Iterator[Path]:
    """A folder that `pack` made smaller, whole in a temporary place; matrices of int8 come as float32.

    Raises:
        ValueError: `packed.json` or a scale is not as `pack` writes it, or the base is another one than it was packed
            with.
    """
    record = read_record(folder)
    base = located(record["base"]) if record["left_out"] else None
    parts = sorted({Path(file).parent.as_posix() for file in record["left_out"]})
    if base is not None and fingerprint(base, *parts) != record["base_fingerprint"]:
        raise ValueError(f"'{folder}' was packed over another '{record['base']}' than there is now.")
    with tempfile.TemporaryDirectory(prefix="kosmosg-") as temporary:
        for file in (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != PACKED):
            name = file.relative_to(folder)
            (target := Path(temporary) / name).parent.mkdir(parents=True, exist_ok=True)
            if file.suffix != ".safetensors":
                shutil.copyfile(file, target)
                continue
            tensors: dict[str, Tensor] = {}
            names = weights_of(file)
            with safe_open(file, "pt") as opened:
                for key in (key for key in names if not key.endswith(SCALE)):
                    tensor = opened.get_tensor(key)
                    if key + SCALE in names:
                        tensor = rescaled(tensor, opened.get_tensor(key + SCALE), f"'{file}': {key}")
                    tensors[key] = tensor
                if base is not None and (absent := record["left_out"].get(name.as_posix())):
                    there = weights_of(base / name.parent)
                    if missing := [key for key in absent if key not in there]:
                        raise ValueError(
                            f"'{folder / PACKED}': left_out names {missing[0]!r} of '{name}'; allowed: the weights in "
                            f"'{base / name.parent}', as {next(iter(there), None)!r}."
                        )
                    tensors |= {key: weight(there[key], key) for key in absent}
                save_file(tensors, target, opened.metadata())
        try:
            yield Path(temporary)
        except (ValueError, FileNotFoundError) as error:  # of parts that do not load; theirs is the temporary's name
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(str(error).replace(temporary, str(folder))) from error


def read_record(folder: Path) -> dict[str, Any]:
    """What `packed.json` says. Raises ValueError: it is not as `pack` writes it; names the key."""
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
    """An int8 matrix as float32. Raises ValueError: it is none, or has another number of rows than scales."""
    if tensor.dtype != torch.int8 or not tensor.dim() or scale.shape != tensor.shape[:1]:
        raise ValueError(
            f"{name} is {tensor.dtype} of {list(tensor.shape)} with scales {list(scale.shape)}; allowed: int8 and one "
            "scale for each row."
        )
    return tensor.float() * scale.view(-1, *[1] * (tensor.dim() - 1))


def located(base: str) -> Path:
    """The model folder of a folder or hub id."""
    return find_model(
        base if Path(base).is_dir() else snapshot_download(base, allow_patterns=["*.json", "*.safetensors"])
    )


def weights_of(part: Path) -> dict[str, Path]:
    """Names of the weights in a file or in a part's folder, and the file of each; none where nothing is there."""
    found: dict[str, Path] = {}
    for file in [part] if part.is_file() else sorted(part.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def weight(file: Path, key: str) -> Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(key)


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
