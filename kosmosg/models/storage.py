"""Model folders: writing them whole, finding them, and loading that refuses weights of another model."""

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
CHANGEABLE = ("dropout", "image_fit")  # from stage to stage, over the same weights
FINGERPRINTED = ("*.json", "*.txt", "*.model", "*.safetensors")
VARIANT = re.compile(r".+\..+\.(safetensors|json)")  # as model.fp16.safetensors, which is not read, and their index


def find_model(folder: str | Path) -> Path:
    """The model folder in `folder`: itself, or `model/` of a run folder.

    Raises:
        FileNotFoundError: neither holds mllm/config.json.
    """
    folder = Path(folder)
    for candidate in (folder, folder / "model"):
        if (candidate / "mllm" / CONFIG_FILE).is_file():
            return candidate
    raise FileNotFoundError(
        f"'{folder}' holds no model: neither mllm/{CONFIG_FILE} nor model/mllm/{CONFIG_FILE} is there. Give the folder "
        "that save_pretrained wrote or a finished run folder."
    )


def save_model(folder: str | Path, tokenizer: Any, **parts: Any) -> None:
    """Write tokenizer/ and the given parts (mllm=, aligner=, aligner_decoder=) into `folder`; None is left out.

    The parts that are there stay until all new ones are complete. One process at a time may write a model folder.
    """
    folder = Path(folder)
    clear_leftovers(folder)  # else what a killed process left would be published with the model
    with ExitStack() as stack:
        for name, part in {**parts, "tokenizer": tokenizer}.items():
            if part is not None:
                part.save_pretrained(stack.enter_context(replaced(folder / name)))


class StrictWeights:
    """Goes before ModelMixin: reading refuses weights left over or missing, which diffusers passes over."""

    config: Any  # constructor arguments by name; diffusers types it as a plain dictionary

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Any:
        """As diffusers', see there for the options.

        Raises:
            ValueError: the weights are not those of the recorded sizes, or not finite; names the first few. Or they
                are there as a pickle alone.
        """
        pickles = [] if any(Path(folder).glob("*.safetensors")) else sorted(Path(folder).glob("*.bin"))
        if pickles:
            raise ValueError(
                f"'{pickles[0]}' is a pickle, which may hold code, and is not read. Where you trust it, write its "
                "tensors to 'diffusion_pytorch_model.safetensors' with safetensors.torch.save_file."
            )
        tell = options.pop("output_loading_info", False)
        # diffusers reports shapes that differ as a ValueError, or leaves them at random with low_cpu_mem_usage; then
        # the report names them.
        try:
            model, report = super().from_pretrained(folder, output_loading_info=True, **options)  # type: ignore[misc]
        except ValueError as error:
            raise ValueError(f"'{folder}': {error}") from error
        check_weights(model, folder, report, ("missing_keys", "unexpected_keys", "mismatched_keys"))
        return (model, report) if tell else model


def load_network(kind: type[Network], source: str | Path, subfolder: str | None = None, **options: Any) -> Network:
    """`from_pretrained` of a diffusers or transformers network, refusing weights that are missing or not finite.

    Raises:
        ValueError: names the first few.
    """
    where = {} if subfolder is None else {"subfolder": subfolder}
    network, report = kind.from_pretrained(source, output_loading_info=True, **where, **options)  # type: ignore
    check_weights(network, "/".join(filter(None, (str(source), subfolder))), report)
    return network


def check_weights(
    network: nn.Module,
    folder: str | Path,
    report: Mapping[str, Collection] = MappingProxyType({}),
    refused: Sequence[str] = ("missing_keys", "mismatched_keys"),
) -> None:
    """Refuse weights that do not fit the network, by the `report` of its loading, or that are NaN or infinite.

    Raises:
        ValueError: names the first few.
    """
    wrong = {name: sorted(map(str, report[name])) for name in refused if report.get(name)}
    if found := "; ".join(f"{len(keys)} {name}, as {keys[:3]}" for name, keys in wrong.items()):
        raise ValueError(f"'{folder}' is not a {type(network).__name__} of the sizes in its {CONFIG_FILE}: {found}.")
    broken = [
        name
        for name, tensor in network.state_dict().items()
        if tensor.is_floating_point() and not tensor.is_meta and not is_finite(tensor)
    ]
    if broken:
        raise ValueError(f"'{folder}' has {len(broken)} weights with NaN or infinite values, as {broken[:3]}.")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # The sum reads each weight once and copies none; it is not finite if a weight is not, or if it overflows.
    return bool(tensor.sum(dtype=torch.float32).isfinite() or tensor.isfinite().all())


def saved_class(folder: Path) -> str | None:
    """Name of the class that wrote the part in `folder`; None where nothing says it."""
    file = folder / CONFIG_FILE
    return json.loads(file.read_text(encoding="utf-8")).get("_class_name") if file.is_file() else None


def load_part(kind: type[Part], folder: Path, torch_dtype: torch.dtype = torch.float32) -> Part:
    """`kind.from_pretrained(folder)`.

    Raises:
        FileNotFoundError: no such part.
        ValueError: see `StrictWeights`.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"'{folder}' holds no {kind.__name__}: {CONFIG_FILE} is missing. An aligner_decoder exists after stage 2 "
            "only, an aligner after stages 2 and 3."
        )
    require_class(kind, folder)
    return kind.from_pretrained(str(folder), dtype=torch_dtype)


def require_class(kind: type[ModelMixin], folder: Path) -> None:
    """Refuse a part of another kind.

    Raises:
        ValueError: names both.
    """
    if (saved := saved_class(folder)) not in (None, kind.__name__):
        raise ValueError(f"'{folder}' holds a {saved}, not a {kind.__name__}: it is of another model.")


def require_same_config(folder: Path, expected: dict, ignored: tuple[str, ...] = CHANGEABLE) -> None:
    """Refuse a saved part whose sizes differ from `expected`, constructor arguments by name.

    Raises:
        ValueError: names every differing key with both values.
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
    """SHA-256 of the settings and weights of some parts of a folder or hub id, without building a network.

    Args:
        parts: folders in `source`; none for `source` itself.
        wanted: which weights count, by name.

    Raises:
        FileNotFoundError: a part holds nothing that is read, or a network whose weights are no safetensors.
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
            raise FileNotFoundError(f"'{Path(source) / part}' holds none of {', '.join(FINGERPRINTED)} to know it by.")
        with ExitStack() as stack:
            tensors: dict[str, Any] = {}
            for file in files:
                if file.suffix == ".safetensors":
                    opened = stack.enter_context(safe_open(file, "pt"))
                    tensors |= dict.fromkeys(opened.keys(), opened)
                    continue
                content = file.read_bytes()
                if file.name == CONFIG_FILE:  # what begins with "_" tells which software wrote it
                    settings = {k: v for k, v in json.loads(content).items() if not k.startswith("_")}
                    content = json.dumps(settings, sort_keys=True).encode()
                digest.update(f"{part}/{file.name} {len(content)}\n".encode() + content)
            # By name, however they are divided into files.
            for name in sorted(filter(wanted, tensors)):
                tensor = tensors[name].get_tensor(name)
                digest.update(f"{part}/{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
