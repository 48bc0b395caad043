"""Files of torch.save, read as data alone: nothing that a file names is imported or called.

Tensors and plain containers are what torch's weights-only unpickler makes of them. The classes that headers of
released checkpoints are made of (argparse.Namespace, OmegaConf's containers and nodes, numpy's scalars) become
`Inert`, which keeps what was recorded and does nothing. Any other class or function is refused by name.
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

TORCHSCRIPT_MEMBER = "constants.pkl"  # of a TorchScript archive; files of torch.save have none
OLD_MAGIC = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")  # files of torch.save before 1.6 begin with it
NUMPY_NUMBER = re.compile(r"[fiub][1248]")


class ConversionError(ValueError):
    """A file, folder or flag with which no model can be converted, exported or inspected; the message names it."""


class Inert:
    """Stands for an object of a foreign class: its arguments and its state, unread."""

    arguments: tuple
    state: Any

    def __new__(cls, *arguments: Any) -> "Inert":
        inert = super().__new__(cls)
        inert.arguments, inert.state = arguments, None
        return inert

    def __setstate__(self, state: Any) -> None:
        self.state = state


class InertScalar(Inert):
    """A number of numpy's: (dtype, bytes)."""

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
    """A released checkpoint: its `model` memory-mapped; its headers, `args` and `cfg`, as plain containers.

    Raises:
        ConversionError: not a checkpoint with a `model`; see `read_data`.
    """
    checkpoint = read_data(path)
    if not (isinstance(checkpoint, dict) and is_state(checkpoint.get("model"))):
        raise ConversionError(f"'{path}' is no released checkpoint: it has no 'model' mapping of tensors at its top.")
    try:
        return {name: value if name == "model" else plain(value) for name, value in checkpoint.items()}
    except RecursionError as error:
        raise ConversionError(f"'{path}': its headers are nested without end.") from error


def is_state(data: Any) -> bool:
    """Whether `data` is a mapping of tensors."""
    return isinstance(data, Mapping) and all(isinstance(tensor, Tensor) for tensor in data.values())


def read_data(path: str | Path) -> Any:
    """What `torch.save` wrote, memory-mapped, and nothing but data; see the module's first lines.

    Raises:
        FileNotFoundError: no such file.
        ConversionError: not a whole file of torch.save, a TorchScript archive, or one that names other classes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{path}'.")
    with path.open("rb") as file:
        head = file.read(64)
    archive = zipfile.is_zipfile(path)
    if not archive and OLD_MAGIC not in head:
        # torch would try such a file as a pickle, and advise to unpickle it for good.
        if head.startswith(pickle.PROTO):
            raise ConversionError(
                f"'{path}' is a raw pickle, which may hold code, and was not read. Where you trust it, unpickle it "
                "yourself and write its tensors with torch.save."
            )
        raise ConversionError(f"'{path}' is truncated, damaged or no file of torch.save; copy or download it again.")
    try:
        if archive:
            require_no_torchscript(path)
        with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in FOREIGN.items()]):
            # Files older than torch 1.6 are no archives and cannot be mapped; they are read whole.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except (ConversionError, MemoryError):
        raise
    except Exception as error:  # in a file that ends early or was never one, the unpickler may stumble over anything
        refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused is None:
            raise ConversionError(
                f"'{path}' is truncated, damaged or holds more than tensors and settings; copy or download it again."
            ) from error
        raise ConversionError(
            f"'{path}' was not read: it names {refused[1]}, which a checkpoint of tensors and settings does not need. "
            "Nothing of it was run. Where you trust it, write its tensors alone with torch.save."
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ConversionError: there is no such file, or something else in it."""
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
    """A folder, or what a hub id's files of these patterns were fetched to. Raises ConversionError: it is neither."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:  # huggingface_hub's own errors are among them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConversionError(f"{what} '{name}' is no folder, and was not fetched from the hub: {reason}") from error


def require_no_torchscript(path: Path) -> None:
    """Refuse an archive that holds code, which is how public CLIP weights are also distributed."""
    with zipfile.ZipFile(path) as archive:
        if any(Path(name).name == TORCHSCRIPT_MEMBER for name in archive.namelist()):
            raise ConversionError(
                f"'{path}' is a TorchScript archive, which holds code. Where you trust it, write its weights alone: "
                f"torch.save(torch.jit.load('{path}', map_location='cpu').state_dict(), 'weights.pt')."
            )


def plain(value: Any) -> Any:
    """A header as dict, list, str, number, bool or None; what has no such form is None."""
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
