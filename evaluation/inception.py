"""The Inception-v3 of FID: TensorFlow's classifier of 2015-12-05, as torch-fidelity and pytorch-fid ported it.

It differs from torchvision's Inception-v3: images are resized as in TensorFlow 1, average pooling excludes padding, the
last pooling branch takes the maximum, and the classifier has 1008 outputs. Attributes are named as in the released
weight file, `{pt_,weights-}inception-2015-12-05-6726825d.pth`.

Shapes: `N` images of any H×W, `C` channels.
"""

import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, linear, max_pool2d

from evaluation.protocols.benchmark import EvaluationError

SIDE = 299
CLASSES = 1008
FEATURES = ("64", "192", "768", "2048", "logits_unbiased")
MAX_MESSAGE = 400  # characters of an error on weights
Layer = tuple[str, int, int | tuple[int, int]] | tuple[str, int, int | tuple[int, int], int]
"""Name, output channels, kernel and stride (default 1); strided layers have no padding."""
Step = Layer | tuple[Layer, Layer] | str
"""A layer, two parallel layers, or the name of a pooling."""


class ConvBN(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, width: int, out: int, kernel: int | tuple[int, int], stride: int = 1, padded: bool = True):
        super().__init__()
        rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (rows // 2, columns // 2) if padded and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(width, out, (rows, columns), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


halve = partial(max_pool2d, kernel_size=3, stride=2)
POOLS = {
    "average": partial(avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False),
    "maximum": partial(max_pool2d, kernel_size=3, stride=1, padding=1),
    "halve": halve,
}


class Mixed(nn.Module):
    """Branches over the same input, concatenated: N×C×H×W → N×C'×H'×W'."""

    def __init__(self, width: int, *branches: list[Step]):
        super().__init__()
        self.branches: list[list[str | list[str]]] = []
        for branch in branches:
            channels, steps = width, []
            for step in branch:
                if isinstance(step, str):
                    steps.append(step)
                    continue
                layers: Any = step if isinstance(step[0], tuple) else (step,)
                for name, *layer in layers:
                    self.add_module(name, ConvBN(channels, *layer))
                channels = sum(out for _, out, *_ in layers)
                steps.append([name for name, *_ in layers])
            self.branches.append(steps)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._branch(steps, x) for steps in self.branches], dim=1)

    def _branch(self, steps: list[str | list[str]], x: Tensor) -> Tensor:
        for step in steps:
            pooled = isinstance(step, str)
            x = POOLS[step](x) if pooled else torch.cat([self.get_submodule(name)(x) for name in step], dim=1)
        return x


def mixed_5(width: int, pooled: int) -> Mixed:
    return Mixed(
        width,
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        ["average", ("branch_pool", pooled, 1)],
    )


def mixed_6(inner: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    double = [("branch7x7dbl_1", inner, 1), ("branch7x7dbl_2", inner, column), ("branch7x7dbl_3", inner, row)]
    return Mixed(
        768,
        [("branch1x1", 192, 1)],
        [("branch7x7_1", inner, 1), ("branch7x7_2", inner, row), ("branch7x7_3", 192, column)],
        [*double, ("branch7x7dbl_4", inner, column), ("branch7x7dbl_5", 192, row)],
        ["average", ("branch_pool", 192, 1)],
    )


def mixed_7(width: int, pool: str) -> Mixed:
    row, column = (1, 3), (3, 1)
    return Mixed(
        width,
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), (("branch3x3_2a", 384, row), ("branch3x3_2b", 384, column))],
        [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
         (("branch3x3dbl_3a", 384, row), ("branch3x3dbl_3b", 384, column))],
        [pool, ("branch_pool", 192, 1)],
    )  # fmt: skip


class InceptionV3(nn.Module):
    """FID's feature network; frozen and always in eval mode.

    Args:
        weights: the released .pth, the same tensors as .safetensors, or a state dict.

    Raises:
        EvaluationError: the file is missing or the tensors are not the network's; names them.
    """

    def __init__(self, weights: str | Path | Mapping[str, Tensor]):
        super().__init__()
        with torch.device("meta"):
            self._build()
        self._load(weights)
        self.eval().requires_grad_(False)

    def _build(self) -> None:
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_5(192, 32), mixed_5(256, 64), mixed_5(288, 64)
        self.Mixed_6a = Mixed(
            288,
            [("branch3x3", 384, 3, 2)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
            ["halve"],
        )
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(mixed_6, (128, 160, 160, 192))
        seven = [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1))]
        self.Mixed_7a = Mixed(
            768,
            [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
            [*seven, ("branch7x7x3_4", 192, 3, 2)],
            ["halve"],
        )
        self.Mixed_7b, self.Mixed_7c = mixed_7(1280, "average"), mixed_7(2048, "maximum")
        self.fc = nn.Linear(2048, CLASSES)

    def train(self, mode: bool = True) -> "InceptionV3":
        """Stay in eval mode: with batch statistics, features would depend on the batch."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 N×3×H×W → features by the names in `FEATURES`: N×64, N×192, N×768, N×2048 and N×1008.

        Raises:
            ValueError: the images have another type or shape.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 N×3×H×W, got {images.dtype} {tuple(images.shape)}.")
        x = (resize_tensorflow1(images.float(), SIDE) - 128) / 128
        features = {}
        x = halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        features["64"] = x.mean((2, 3))
        x = halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        features["192"] = x.mean((2, 3))
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        features["768"] = x.mean((2, 3))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        features["2048"] = x.mean((2, 3))
        features["logits_unbiased"] = linear(features["2048"], self.fc.weight)
        return features

    def _load(self, weights: str | Path | Mapping[str, Tensor]) -> None:
        source, state = ("the state dict", weights) if isinstance(weights, Mapping) else (f"'{weights}'", read(weights))
        floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        try:
            self.load_state_dict(floats, strict=True, assign=True)
        except RuntimeError as error:  # lists missing and unexpected keys and wrong shapes
            problems = shorten(str(error).partition("\n")[2], MAX_MESSAGE)
            raise EvaluationError(f"{source} does not hold the tensors of FID's Inception-v3: {problems}") from error


def read(file: str | Path) -> dict[str, Tensor]:
    """Read the state dict in a .pth or .safetensors file; pickled code is not run.

    Raises:
        EvaluationError: the file is missing or does not hold a state dict.
    """
    path = Path(file)
    if not path.is_file():
        raise EvaluationError(
            f"there is no weight file '{path}'; it must be the released .pth or a .safetensors of it."
        )
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, OSError, EOFError, RuntimeError) as error:
        cause = str(error).partition(". ")[0]  # torch continues with advice to run the pickle
        raise EvaluationError(f"'{path}' cannot be read as weights ({cause}).") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise EvaluationError(
            f"'{path}' holds no state dict but a {type(state).__name__}; it must map names to tensors."
        )
    return state


def resize_tensorflow1(images: Tensor, side: int) -> Tensor:
    """Resize N×3×H×W to N×3×S×S, bilinear without half-pixel offset or antialiasing: output i reads input i·in/out."""
    for dim in (2, 3):
        size = images.shape[dim]
        at = torch.arange(side, device=images.device) * (size / side)
        low = at.floor().long().clamp(max=size - 1)
        weight = (at - low).unsqueeze(-1) if dim == 2 else at - low
        below, above = images.index_select(dim, low), images.index_select(dim, (low + 1).clamp(max=size - 1))
        images = below + (above - below) * weight
    return images
