"""Weights of a part: names, shapes and dtypes in memory, values memory-mapped on demand.

A mapped page uses memory from its first access until the mapping is released. To limit memory, values are processed in
chunks, each with a new mapping.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kosmosg.conversion.names import current_name, equal, is_unneeded, released_name
from kosmosg.conversion.reader import ConversionError, is_state, read_data, read_json
from kosmosg.models.storage import is_finite

Shapes = Mapping[str, tuple[int, ...]]
CHUNK_BYTES = 512 * 2**20  # maximum size of a chunk
CHUNKS = 8  # minimum number of chunks, so that a chunk is small compared with its part
SMALL_BYTES = 2**20  # parts of up to this size are one chunk, because each chunk reads the file's header again
CAST_ELEMENTS = 2**22  # elements of a tensor cast at a time
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Weights:
    """The tensors of a part by name.

    Args:
        origin: file or folder, for messages.
        open: memory-maps the values; each call makes a new mapping.
    """

    origin: str
    shapes: Shapes
    dtypes: Mapping[str, torch.dtype]
    open: Callable[[], dict[str, Tensor]]

    @classmethod
    def of(cls, origin: str | Path, open: Callable[[], dict[str, Tensor]]) -> "Weights":
        """Read names, shapes and dtypes without accessing values."""
        tensors = open()
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return cls(str(origin), shapes, {name: tensor.dtype for name, tensor in tensors.items()}, open)

    @property
    def parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    @property
    def dtype(self) -> str:
        """The dtype of the weights, or all dtypes with their counts."""
        counts = Counter(str(dtype).removeprefix("torch.") for dtype in self.dtypes.values())
        return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n} {dtype}" for dtype, n in counts.items())

    def bytes(self, name: str) -> int:
        return torch.Size(self.shapes[name]).numel() * self.dtypes[name].itemsize

    def chunks(self) -> Iterator[list[str]]:
        """Group names into chunks of limited size; a larger tensor is a chunk of its own."""
        limit = min(CHUNK_BYTES, max(SMALL_BYTES, sum(map(self.bytes, self.shapes)) // CHUNKS))
        group: list[str] = []
        size = 0
        for name in self.shapes:
            if group and size + self.bytes(name) > limit:
                yield group
                group, size = [], 0
            group.append(name)
            size += self.bytes(name)
        yield group

    def save(self, file: Path, dtype: torch.dtype | None = None) -> None:
        """Write a safetensors file, in `dtype` if given.

        Raises:
            ConversionError: a weight is NaN or infinite, or overflows `dtype`.
        """
        for group in self.chunks():
            opened = self.open()
            for name in group:
                if opened[name].is_floating_point() and not is_finite(opened[name]):
                    raise ConversionError(f"{self.origin}: '{name}' has NaN or infinite values.")
        if dtype is None or all(d == dtype or not d.is_floating_point for d in self.dtypes.values()):
            tensors = {name: tensor.contiguous() for name, tensor in self.open().items()}
        else:
            tensors = self._cast(dtype)
        save_file(tensors, file, metadata={"format": "pt"})

    def _cast(self, dtype: torch.dtype) -> dict[str, Tensor]:
        # One large allocation is returned to the system when freed; many small ones would stay with the process.
        counts = [
            torch.Size(shape).numel() for name, shape in self.shapes.items() if self.dtypes[name].is_floating_point
        ]
        buffers = iter(torch.empty(sum(counts), dtype=dtype).split(counts))
        cast: dict[str, Tensor] = {}
        for group in self.chunks():
            opened = self.open()  # a new mapping, which releases the pages of the previous chunk
            for name in group:
                tensor = opened[name]
                if not tensor.is_floating_point():
                    cast[name] = tensor.clone()
                    continue
                cast[name] = (flat := next(buffers)).view(tensor.shape)
                # In slices, because the check needs several times the memory of its input.
                slices = zip(flat.split(CAST_ELEMENTS), tensor.reshape(-1).split(CAST_ELEMENTS), strict=True)
                for target, source in slices:
                    target.copy_(source)
                    if (torch.isfinite(source) & ~torch.isfinite(target)).any():
                        raise ConversionError(
                            f"{self.origin}: '{name}' does not fit {dtype}; choose --dtype bfloat16 or none."
                        )
        return cast

    def compare(self, other: "Weights") -> str:
        """Describe the difference from other weights."""
        if self.shapes != other.shapes:
            return "other names or shapes"
        rounded, unequal = False, 0
        for group in self.chunks():
            ours, theirs = self.open(), other.open()
            for name in group:
                rounded |= ours[name].dtype != theirs[name].dtype
                unequal += not equal(ours[name], theirs[name].to(ours[name].dtype))
        if unequal:
            return f"{unequal} of {len(self.shapes)} tensors differ"
        return f"bit-equal after rounding to {self.dtype}" if rounded else "bit-equal"


def weight_files(folder: Path) -> list[Path]:
    """Return the weights files of a diffusers or transformers folder, several if sharded; empty if there are none."""
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
        for suffix in (".safetensors", ".bin"):
            if (folder / f"{stem}{suffix}").is_file():
                return [folder / f"{stem}{suffix}"]
    return []


def folder_weights(folder: Path, part: str) -> Weights | None:
    """Return the weights in a part's folder under current names, or None.

    Raises:
        ConversionError: a file is damaged.
    """
    files = weight_files(folder)

    def open_all() -> dict[str, Tensor]:
        opened = (named for file in files for named in open_weights(file).items())
        tensors = {current_name(part, name): tensor for name, tensor in opened}
        # Without the buffers that older library versions saved.
        return {name: t for name, t in tensors.items() if not is_unneeded(str(released_name(part, name)))}

    return Weights.of(folder, open_all) if files else None


def required_weights(folder: Path, part: str) -> Weights:
    """Return the weights in a part's folder. Raises ConversionError if there are none."""
    if (weights := folder_weights(folder, part)) is None:
        raise ConversionError(f"'{folder}' has a config.json but no weights.")
    return weights


def open_weights(file: Path) -> dict[str, Tensor]:
    """Memory-map the tensors of a .safetensors or .bin file.

    Raises:
        ConversionError: the file is damaged or holds anything else.
    """
    if file.suffix == ".bin":
        state = read_data(file)
        if not is_state(state):
            raise ConversionError(
                f"'{file}' is not a state dict. Load the part with its own library and write it with save_pretrained, "
                "which makes a .safetensors file."
            )
        return dict(state)
    try:
        with safe_open(file, framework="pt"):  # raises an error for truncated files
            return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"'{file}' is missing, truncated or not a safetensors file: {error}") from error
