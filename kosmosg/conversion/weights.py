"""The tensors of one part: their names, shapes and types at hand, their values mapped when asked for.

A mapped page counts as memory once it is touched, and is given back when its mapping goes. So values are opened anew
for each piece of work, and no two pieces are resident together.
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
CHUNK_BYTES = 512 * 2**20  # of source, at most, in memory beside what is written
CHUNKS = 8  # at least, so that a small part's chunk is small beside it
SMALL_BYTES = 2**20  # not divided: for each chunk the file's names are read anew
CAST_ELEMENTS = 2**22  # of a tensor at a time
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Weights:
    """One part's tensors by name.

    Args:
        origin: file or folder, for messages.
        open: maps the values; each call maps them anew.
    """

    origin: str
    shapes: Shapes
    dtypes: Mapping[str, torch.dtype]
    open: Callable[[], dict[str, Tensor]]

    @classmethod
    def of(cls, origin: str | Path, open: Callable[[], dict[str, Tensor]]) -> "Weights":
        """Open once to learn names, shapes and types; no value is touched."""
        tensors = open()
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return cls(str(origin), shapes, {name: tensor.dtype for name, tensor in tensors.items()}, open)

    @property
    def parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    @property
    def dtype(self) -> str:
        """The type of the weights, or all with their counts."""
        counts = Counter(str(dtype).removeprefix("torch.") for dtype in self.dtypes.values())
        return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n} {dtype}" for dtype, n in counts.items())

    def bytes(self, name: str) -> int:
        return torch.Size(self.shapes[name]).numel() * self.dtypes[name].itemsize

    def chunks(self) -> Iterator[list[str]]:
        """Names in groups of at most `CHUNK_BYTES` and a share of all, or single where one is larger.

        A small part is one group.
        """
        most = min(CHUNK_BYTES, max(SMALL_BYTES, sum(map(self.bytes, self.shapes)) // CHUNKS))
        group: list[str] = []
        size = 0
        for name in self.shapes:
            if group and size + self.bytes(name) > most:
                yield group
                group, size = [], 0
            group.append(name)
            size += self.bytes(name)
        yield group

    def save(self, file: Path, dtype: torch.dtype | None = None) -> None:
        """Write a safetensors file, in `dtype` if given.

        Raises:
            ConversionError: a weight is NaN or infinite, or has no finite value in `dtype`.
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
        # One piece of memory goes back to the system when it is dropped; many small ones would stay with the process.
        counts = [
            torch.Size(shape).numel() for name, shape in self.shapes.items() if self.dtypes[name].is_floating_point
        ]
        room = iter(torch.empty(sum(counts), dtype=dtype).split(counts))
        cast: dict[str, Tensor] = {}
        for group in self.chunks():
            opened = self.open()  # anew, which gives the pages of the group before back
            for name in group:
                tensor = opened[name]
                if not tensor.is_floating_point():
                    cast[name] = tensor.clone()
                    continue
                cast[name] = (flat := next(room)).view(tensor.shape)
                # In slices, for the check takes several times the memory of what it looks at.
                slices = zip(flat.split(CAST_ELEMENTS), tensor.reshape(-1).split(CAST_ELEMENTS), strict=True)
                for target, source in slices:
                    target.copy_(source)
                    if (torch.isfinite(source) & ~torch.isfinite(target)).any():
                        raise ConversionError(
                            f"{self.origin}: '{name}' does not fit {dtype}; choose --dtype bfloat16 or none."
                        )
        return cast

    def compare(self, other: "Weights") -> str:
        """What differs from another part's weights, in words."""
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
    """The files of a diffusers or transformers part, several where it is sharded; empty if there are none."""
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
        for suffix in (".safetensors", ".bin"):
            if (folder / f"{stem}{suffix}").is_file():
                return [folder / f"{stem}{suffix}"]
    return []


def folder_weights(folder: Path, part: str) -> Weights | None:
    """The weights in a part's folder under today's names; None where there are none.

    Raises:
        ConversionError: a damaged file.
    """
    files = weight_files(folder)

    def open_all() -> dict[str, Tensor]:
        opened = (named for file in files for named in open_weights(file).items())
        tensors = {current_name(part, name): tensor for name, tensor in opened}
        # Buffers that older library versions wrote along.
        return {name: t for name, t in tensors.items() if not is_unneeded(str(released_name(part, name)))}

    return Weights.of(folder, open_all) if files else None


def required_weights(folder: Path, part: str) -> Weights:
    """`folder_weights`. Raises ConversionError: there are none."""
    if (weights := folder_weights(folder, part)) is None:
        raise ConversionError(f"'{folder}' has a config.json but no weights.")
    return weights


def open_weights(file: Path) -> dict[str, Tensor]:
    """Mapped tensors of a .safetensors or .bin file.

    Raises:
        ConversionError: a damaged file, or one that holds anything else.
    """
    if file.suffix == ".bin":
        state = read_data(file)
        if not is_state(state):
            raise ConversionError(
                f"'{file}' holds no state dict. Load the part with its own library and write it with save_pretrained, "
                "which makes a .safetensors file."
            )
        return dict(state)
    try:
        with safe_open(file, framework="pt"):  # a file that ends early is told here
            return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"'{file}' is missing, truncated or no safetensors file: {error}") from error
