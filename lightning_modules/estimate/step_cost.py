"""What a forward and backward pass costs, counted by running it on tensors without values.

The module runs as it is, under PyTorch's FakeTensorMode: shapes, dtypes and autocast are real, nothing is stored or
computed.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.bfloat16}  # the CPU's autocast stands for the GPU's


@dataclass(frozen=True)
class PassCost:
    """Of one pass: floating-point operations, and the most bytes alive beside parameters and their gradients."""

    flops: float
    activations: float


@dataclass(frozen=True)
class StepCost:
    """Of a pass over any number of rows: a + b · rows, from passes over one and two rows.

    What does not grow with the rows are, for memory, the copies of weights in half precision that autocast keeps.
    """

    one: PassCost
    two: PassCost

    def flops(self, rows: int) -> float:
        return self.one.flops + (rows - 1) * (self.two.flops - self.one.flops)

    def row_bytes(self) -> float:
        """Activations of a row."""
        return self.two.activations - self.one.activations

    def fixed_bytes(self) -> float:
        """Activations that do not grow with the rows."""
        return max(0.0, self.one.activations - self.row_bytes())


@contextlib.contextmanager
def without_values() -> Iterator[FakeTensorMode]:
    """Modules and tensors made inside have shapes, but no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def measure(module: nn.Module, loss: Callable[[], Tensor], precision: str) -> PassCost:
    """Cost of `loss()` and its backward pass, inside `without_values`; no gradient is kept."""
    hooks = [
        parameter.register_post_accumulate_grad_hook(drop_gradient)
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    live = LiveBytes([*module.parameters(), *module.buffers()])
    half = HALF.get(precision)
    autocast = torch.autocast("cpu", dtype=half, cache_enabled=False) if half else contextlib.nullcontext()
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter, live, EverywhereCounted():
        with autocast:
            value = loss()
        value.backward()
    for hook in hooks:
        hook.remove()
    return PassCost(counter.get_total_flops(), live.peak)


class LiveBytes(TorchDispatchMode):
    """Follows every storage that comes into being, from its making to its end; `peak` is the most at a time."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._meet(result.untyped_storage())
        return results

    def _meet(self, storage: torch.UntypedStorage) -> None:
        identity, size = storage._cdata, storage.nbytes()
        if identity in self._seen:
            return
        self._seen.add(identity)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._part, identity, size)

    def _part(self, identity: int, size: int) -> None:
        self._seen.discard(identity)
        self.now -= size


class EverywhereCounted(TorchFunctionMode):
    """Which positions a mask picks depends on values; here every mask picks all."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            return args[0].flatten(0, args[1].ndim - 1)
        return function(*args, **(kwargs or {}))


def drop_gradient(parameter: Tensor) -> None:
    """Sharding hands a gradient on as soon as it is there; what is kept of it is counted with the parameters."""
    parameter.grad = None


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# PyTorch counts the attention kernels of GPUs alone.
ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
