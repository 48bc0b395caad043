"""Load files of torch.save as data only: no code that a file names is imported or called.

torch's weights-only unpickler loads tensors and plain containers. Classes in the headers of released checkpoints
(argparse.Namespace, OmegaConf's containers and nodes, numpy's scalars) become `Inert` objects, which only store data.
Any other class or function is refused.
"""

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
from torch import Tensor

TORCHSCRIPT_MEMBER = "constants.pkl"  # in TorchScript archives, but not in files of torch.save
OLD_MAGIC = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")  # in the header of files of torch before 1.6
NUMPY_NUMBER = re.compile(r"[fiub][1248]")


class ConversionError(ValueError):
    """A model cannot be converted, exported or inspected; the message names the file, folder or flag."""


class Inert:
    """Replacement for an object of another class that only stores its arguments and state."""

    arguments: tuple
    state: Any

    def __new__(cls, *arguments: Any) -> "Inert":
        inert = super().__new__(cls)
        inert.arguments, inert.state = arguments, None
        return inert

    def __setstate__(self, state: Any) -> None:
        self.state = state


class InertScalar(Inert):
    """Replacement for a numpy scalar, with the arguments dtype and bytes."""

    def number(self) -> Any:
        dtype, data = self.arguments
        code = dtype.arguments[0]
        if not (isinstance(code, str) and NUMPY_NUMBER.fullmatch(code)):
            return None
        order = dtype.state[1] if isinstance(dtype.state, tuple) else "="
        return np.frombuffer(data, dtype=f"{order.replace('|', '=')}{code}")[0].item()


NODES = ("AnyNode", "StringNode", "IntegerNode", "FloatNode", "BooleanNode", "BytesNode", "PathNode", "EnumNode")
FOREIGN: dict[str, type] = {
    "argparse.Namespace": argparse.Namespace,
    "omegaconf.dictconfig.DictConfig": Inert,
    "omegaconf.listconfig.ListConfig": Inert,
    **{f"omegaconf.nodes.{name}": Inert for name in (*NODES, "InterpolationResultNode")},
    **{f"omegaconf.base.{name}": Inert for name in ("Metadata", "ContainerMetadata", "SCMode")},
    **{f"typing.{name}": Inert for name in ("Any", "Dict", "List")},
    "collections.defaultdict": Inert,
    **{f"builtins.{name}": Inert for name in ("dict", "list", "tuple", "int", "float", "bool", "str", "bytes")},
    "pathlib.PosixPath": Inert,
    "numpy.dtype": Inert,
    "numpy.core.multiarray.scalar": InertScalar,
    "numpy._core.multiarray.scalar": InertScalar,
}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a released checkpoint, with a memory-mapped `model` and the headers `args` and `cfg` as plain containers.

    Raises:
        ConversionError: the checkpoint has no `model`, or see `read_data`.
    """
    checkpoint = read_data(path)
    if not (isinstance(checkpoint, dict) and is_state(checkpoint.get("model"))):
        raise ConversionError(f"'{path}' is not a released checkpoint: it has no mapping 'model' of tensors.")
    try:
        return {name: value if name == "model" else plain(value) for name, value in checkpoint.items()}
    except RecursionError as error:
        raise ConversionError(f"'{path}': its headers are nested too deeply.") from error


def is_state(data: Any) -> bool:
    """Return whether `data` is a mapping of tensors."""
    return isinstance(data, Mapping) and all(isinstance(tensor, Tensor) for tensor in data.values())


def read_data(path: str | Path) -> Any:
    """Load a file of `torch.save` as memory-mapped data; see the module's docstring.

    Raises:
        FileNotFoundError: the file does not exist.
        ConversionError: the file is damaged, not of torch.save, a TorchScript archive, or names other classes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{path}'.")
    with path.open("rb") as file:
        head = file.read(64)
    archive = zipfile.is_zipfile(path)
    if not archive and OLD_MAGIC not in head:
        # torch would load such a file as a pickle, and advise to unpickle it without restrictions.
        if head.startswith(pickle.PROTO):
            raise ConversionError(
                f"'{path}' is a raw pickle, which may contain code, and was not loaded. If you trust it, unpickle it "
                "yourself and save its tensors with torch.save."
            )
        raise ConversionError(f"'{path}' is truncated, damaged or not of torch.save; copy or download it again.")
    try:
        if archive:
            require_no_torchscript(path)
        with torch.serialization.safe_globals([(replacement, name) for name, replacement in FOREIGN.items()]):
            # Files older than torch 1.6 are not archives and cannot be memory-mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except (ConversionError, MemoryError):
        raise
    except Exception as error:  # the unpickler may raise any exception on a damaged file
        refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused is None:
            raise ConversionError(
                f"'{path}' is truncated, damaged or holds more than tensors and settings; copy or download it again."
            ) from error
        raise ConversionError(
            f"'{path}' was not loaded: it names {refused[1]}, which a checkpoint of tensors and settings does not "
            "need. None of its code was run. If you trust it, save only its tensors with torch.save."
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ConversionError if the file is missing or holds anything else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"'{file}' does not exist.") from error
    except ValueError as error:
        raise ConversionError(f"'{file}' is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConversionError(f"'{file}' holds {type(values).__name__} at its top; it must be an object.")
    return values


def find_folder(name: str | Path, patterns: Sequence[str], what: str) -> Path:
    """Return a folder, or download the files of a hub id. Raises ConversionError if it is neither."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:  # includes the errors of huggingface_hub
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConversionError(f"{what} '{name}' is not a folder and cannot be downloaded: {reason}") from error


def require_no_torchscript(path: Path) -> None:
    """Refuse TorchScript archives, which contain code; OpenAI distributes CLIP's weights in this form."""
    with zipfile.ZipFile(path) as archive:
        if any(Path(name).name == TORCHSCRIPT_MEMBER for name in archive.namelist()):
            raise ConversionError(
                f"'{path}' is a TorchScript archive, which contains code. If you trust it, save only its weights: "
                f"torch.save(torch.jit.load('{path}', map_location='cpu').state_dict(), 'weights.pt')."
            )


def plain(value: Any) -> Any:
    """Convert a header to dict, list, str, number, bool and None; anything else becomes None."""
    if isinstance(value, argparse.Namespace):
        return plain(vars(value))
    if isinstance(value, InertScalar):
        return value.number()
    if isinstance(value, Inert):
        state = value.state if isinstance(value.state, dict) else {}
        return plain(state.get("_content", state.get("_val")))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool)) else None
