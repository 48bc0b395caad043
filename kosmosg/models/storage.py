"""Save, find and load model folders; loading refuses weights that do not match the configuration."""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn

from kosmosg.files import clear_leftovers, replaced

Part = TypeVar("Part", bound=ModelMixin)
Network = TypeVar("Network", bound=nn.Module)
CONFIG_FILE = "config.json"
CHANGEABLE = ("dropout", "image_fit")  # settings that may change between stages with the same weights
FINGERPRINTED = ("*.json", "*.txt", "*.model", "*.safetensors")
VARIANT = re.compile(r".+\..+\.(safetensors|json)")  # e.g. model.fp16.safetensors, which is not loaded, and its index


def find_model(folder: str | Path) -> Path:
    """Return `folder` if it is a model folder, or `model/` of a run folder.

    Raises:
        FileNotFoundError: neither contains mllm/config.json.
    """
    folder = Path(folder)
    for candidate in (folder, folder / "model"):
        if (candidate / "mllm" / CONFIG_FILE).is_file():
            return candidate
    raise FileNotFoundError(
        f"'{folder}' holds no model: neither mllm/{CONFIG_FILE} nor model/mllm/{CONFIG_FILE} exists. Give a folder "
        "that save_pretrained wrote, or the folder of a finished run."
    )


def save_model(folder: str | Path, tokenizer: Any, **parts: Any) -> None:
    """Write tokenizer/ and the given parts (mllm=, aligner=, aligner_decoder=) to `folder`; None is skipped.

    Existing parts are replaced only when all new ones are complete. Only one process may write to a model folder.
    """
    folder = Path(folder)
    clear_leftovers(folder)  # otherwise files of a killed process would be published with the model
    with ExitStack() as stack:
        for name, part in {**parts, "tokenizer": tokenizer}.items():
            if part is not None:
                part.save_pretrained(stack.enter_context(replaced(folder / name)))


class StrictWeights:
    """Base class before ModelMixin that refuses missing, unexpected and non-finite weights, which diffusers accepts."""

    config: Any  # constructor arguments by name; diffusers types it as a plain dictionary

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Any:
        """Load a folder; `options` are those of diffusers.

        Raises:
            ValueError: the weights do not match the configuration or are not finite (names the first few), or there
                is only a pickle.
        """
        pickles = [] if any(Path(folder).glob("*.safetensors")) else sorted(Path(folder).glob("*.bin"))
        if pickles:
            raise ValueError(
                f"'{pickles[0]}' is a pickle, which may contain code, and is not loaded. If you trust it, save its "
                "tensors as 'diffusion_pytorch_model.safetensors' with safetensors.torch.save_file."
            )
        output_loading_info = options.pop("output_loading_info", False)
        # For shapes that differ, diffusers raises a ValueError or, with low_cpu_mem_usage, keeps random weights. The
        # report names them in both cases.
        try:
            model, report = super().from_pretrained(folder, output_loading_info=True, **options)  # type: ignore[misc]
        except ValueError as error:
            raise ValueError(f"'{folder}': {error}") from error
        check_weights(model, folder, report, ("missing_keys", "unexpected_keys", "mismatched_keys"))
        return (model, report) if output_loading_info else model


def load_network(kind: type[Network], source: str | Path, subfolder: str | None = None, **options: Any) -> Network:
    """Load a diffusers or transformers network.

    Raises:
        ValueError: weights are missing or not finite; names the first few.
    """
    options |= {} if subfolder is None else {"subfolder": subfolder}
    network, report = kind.from_pretrained(source, output_loading_info=True, **options)  # type: ignore
    check_weights(network, "/".join(filter(None, (str(source), subfolder))), report)
    return network


def check_weights(
    network: nn.Module,
    folder: str | Path,
    report: Mapping[str, Collection] = MappingProxyType({}),
    refused: Sequence[str] = ("missing_keys", "mismatched_keys"),
) -> None:
    """Check the weights of a network and the `report` of loading them.

    Raises:
        ValueError: weights do not match the network, or are NaN or infinite; names the first few.
    """
    wrong = {name: sorted(map(str, report[name])) for name in refused if report.get(name)}
    if problems := "; ".join(f"{len(keys)} {name}, such as {keys[:3]}" for name, keys in wrong.items()):
        raise ValueError(f"'{folder}' is not a {type(network).__name__} of the sizes in its {CONFIG_FILE}: {problems}.")
    broken = [
        name
        for name, tensor in network.state_dict().items()
        if tensor.is_floating_point() and not tensor.is_meta and not is_finite(tensor)
    ]
    if broken:
        raise ValueError(f"'{folder}' has {len(broken)} weights with NaN or infinite values, such as {broken[:3]}.")


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether no value is NaN or infinite."""
    # The sum makes no copy. It is not finite if a value is not, or if it overflows, so check again in that case.
    return bool(tensor.sum(dtype=torch.float32).isfinite() or tensor.isfinite().all())


def saved_class(folder: Path) -> str | None:
    """Return the name of the class in the configuration of `folder`, or None."""
    file = folder / CONFIG_FILE
    return json.loads(file.read_text(encoding="utf-8")).get("_class_name") if file.is_file() else None


def load_part(kind: type[Part], folder: Path, torch_dtype: torch.dtype = torch.float32) -> Part:
    """Load a part of a model with `kind.from_pretrained`.

    Raises:
        FileNotFoundError: the part does not exist.
        ValueError: the part is of another class, or see `StrictWeights`.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"'{folder}' holds no {kind.__name__}: {CONFIG_FILE} is missing. Stage 2 writes an aligner and an "
            "aligner_decoder, stage 3 an aligner."
        )
    require_class(kind, folder)
    return kind.from_pretrained(str(folder), dtype=torch_dtype)


def require_class(kind: type[ModelMixin], folder: Path) -> None:
    """Check that `folder` was saved by the class `kind`.

    Raises:
        ValueError: it was saved by another class.
    """
    if (saved := saved_class(folder)) not in (None, kind.__name__):
        raise ValueError(f"'{folder}' holds a {saved}, not a {kind.__name__}: it belongs to another model.")


def require_same_config(folder: Path, expected: dict, ignored: tuple[str, ...] = CHANGEABLE) -> None:
    """Check that the configuration of a saved part equals `expected`, except for the keys in `ignored`.

    Raises:
        FileNotFoundError: there is no saved part.
        ValueError: values differ; names each key with both values.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist, so '{folder}' is not a saved part of a model.")
    saved = json.loads(path.read_text(encoding="utf-8"))
    different = [
        f"{key} is {saved.get(key)!r} there and {value!r} in the configuration"
        for key, value in expected.items()
        if key not in ignored and saved.get(key) != value
    ]
    if different:
        raise ValueError(f"'{folder}' is a checkpoint of another model: " + "; ".join(different) + ".")


def fingerprint(source: str | Path, *parts: str, wanted: Callable[[str], bool] = lambda _: True) -> str:
    """Return the SHA-256 of the configuration and weights in a folder or hub id, without building a network.

    Args:
        parts: subfolders of `source`; none for `source` itself.
        wanted: selects weights by name.

    Raises:
        FileNotFoundError: a part contains no configuration, or its weights are not safetensors.
    """
    if not Path(source).is_dir():
        patterns = [f"{part}/{pattern}" for part in parts for pattern in FINGERPRINTED] or FINGERPRINTED
        source = snapshot_download(str(source), allow_patterns=list(patterns), ignore_patterns=["*.*.safetensors"])
    digest = hashlib.sha256()
    for part in parts or (".",):
        files = sorted({file for pattern in FINGERPRINTED for file in (Path(source) / part).glob(pattern)})
        files = [file for file in files if not VARIANT.fullmatch(file.name)]
        weights = any(file.suffix == ".safetensors" for file in files)
        if not files or (not weights and (Path(source) / part / CONFIG_FILE).is_file()):
            raise FileNotFoundError(f"'{Path(source) / part}' holds none of {', '.join(FINGERPRINTED)}.")
        with ExitStack() as stack:
            tensors: dict[str, Any] = {}
            for file in files:
                if file.suffix == ".safetensors":
                    opened = stack.enter_context(safe_open(file, "pt"))
                    tensors |= dict.fromkeys(opened.keys(), opened)
                    continue
                content = file.read_bytes()
                if file.name == CONFIG_FILE:  # keys with a leading "_" only name the software that wrote it
                    settings = {k: v for k, v in json.loads(content).items() if not k.startswith("_")}
                    content = json.dumps(settings, sort_keys=True).encode()
                digest.update(f"{part}/{file.name} {len(content)}\n".encode() + content)
            # Sorted by name, so that sharding into files does not matter.
            for name in sorted(filter(wanted, tensors)):
                tensor = tensors[name].get_tensor(name)
                digest.update(f"{part}/{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
