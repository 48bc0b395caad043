"""AdamW with linear warm-up and linear decay to zero (paper section 3.2), the same in all stages.

Step n (from 1) uses the schedule's value at n − 1, so the first step has rate 0, as in the released code
(released-code.md, "Optimiser"). Its Adam adds eps to sqrt(v) before the bias correction, PyTorch's after: that is
PyTorch's with eps / sqrt(1 − β₂ᵗ), which is set before each step.

With `eight_bit` the moments are kept in 8 bits (Dettmers et al. 2022, arXiv 2110.02861): codes into a table of 256
values, finer near 0, and a scale for each block of 256 numbers of a row. Blocks do not cross rows, so that FSDP2's
shards of a parameter hold whole blocks and a checkpoint may be read by any number of ranks.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.adamw import adamw

MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCK = 256
LEAST_QUANTIZED = 4096  # numbers; smaller parameters keep moments in float32


@dataclass
class OptimizerConfig:
    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of AdamW's moments."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    eps_before_correction: bool = True
    """Add eps before the bias correction, as the released code; false is PyTorch's own AdamW."""
    weight_decay: float = 0.01
    """Decoupled decay of every trainable parameter, biases and norms too (as the released code)."""
    warmup_steps: int = 375
    """Steps over which the rate rises linearly to `lr`; then it falls linearly to 0 at trainer.max_steps."""
    fused: bool | None = None
    """One kernel for the whole step; null takes it on a GPU. On a CPU it changes the last bits."""
    eight_bit: bool = False
    """Keep the moments in 8 bits: 2 bytes for each trainable number in place of 8."""
    max_grad_norm: float = 2.0
    """Largest norm of the whole gradient; longer ones are scaled down to it."""

    def __post_init__(self) -> None:
        for name, value, right, allowed in (
            ("lr", self.lr, self.lr > 0, "above 0"),
            ("betas", self.betas, all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)"),
            ("eps", self.eps, self.eps > 0, "above 0"),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more"),
            ("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "0 or more"),
            ("max_grad_norm", self.max_grad_norm, self.max_grad_norm > 0, "above 0"),
        ):
            if not right:
                raise ValueError(f"optimizer.{name} is {value}; allowed: {allowed}")


def learning_rate_factor(finished: int, warmup_steps: int, max_steps: int) -> float:
    """Share of the peak rate after `finished` optimizer steps: linear up, then linear to 0 at `max_steps`."""
    if finished < warmup_steps:
        return finished / warmup_steps
    return max(0.0, (max_steps - finished) / max(1, max_steps - warmup_steps))


class StageAdamW(AdamW):
    """AdamW with a choice where eps goes; a step without any gradient, as a skipped one is, changes nothing.

    Args:
        eps_before_correction: see `OptimizerConfig`.
        options: of AdamW.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, eps: float, eps_before_correction: bool, **options: Any):
        super().__init__(parameters, eps=eps, **options)
        self.configured_eps, self.eps_before_correction = eps, eps_before_correction
        # The gradients are clipped before the step, so a loss scaler must have scaled them back by then.
        self._step_supports_amp_scaling = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` computes loss and gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if any(parameter.grad is not None for parameter in parameters):
            if self.eps_before_correction:
                # All trainable parameters have a gradient in every step, so one's count is that of all.
                taken = next((int(self.state[p]["step"]) for p in parameters if "step" in self.state[p]), 0)
                for group in self.param_groups:
                    group["eps"] = self.configured_eps / math.sqrt(1 - group["betas"][1] ** (taken + 1))
            self.update()
        return loss

    def update(self) -> None:
        """The step itself."""
        super().step()

    def empty_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Room for a parameter's state, to be filled from a checkpoint."""
        step = torch.empty((), device=parameter.device if self.defaults["fused"] else "cpu")
        return {"step": step, **{name: torch.empty_like(parameter).detach() for name in MOMENTS}}


class StageAdamW8bit(StageAdamW):
    """The same with moments in 8 bits, one parameter after the other. Vectors and small parameters keep float32's."""

    @torch.no_grad()
    def update(self) -> None:
        for group in self.param_groups:
            options = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= {name: tensor.zero_() for name, tensor in self.empty_state(parameter).items()}
                weight, gradient = local(parameter), local(parameter.grad)
                moments = [self.moment(state, name, weight) for name in MOMENTS]
                lists: Any = [[weight], [gradient], *([moment] for moment in moments), [], [state["step"]]]
                beta1, beta2 = group["betas"]
                adamw(*lists, foreach=False, beta1=beta1, beta2=beta2, **options)
                for name, moment in zip(MOMENTS, moments, strict=True):
                    if name not in state:
                        codes, scales = quantize(moment.flatten(1), code_values(name, moment.device))
                        local(state[f"{name}_codes"]).copy_(codes)
                        local(state[f"{name}_scales"]).copy_(scales)

    def moment(self, state: dict[str, Tensor], name: str, weight: Tensor) -> Tensor:
        """A parameter's moment in float32."""
        if name in state:
            return local(state[name])
        codes, scales = (local(state[f"{name}_{part}"]) for part in ("codes", "scales"))
        return dequantize(codes, scales, code_values(name, codes.device)).view_as(weight)

    def empty_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = super().empty_state(parameter)
        if parameter.ndim < 2 or parameter.numel() < LEAST_QUANTIZED:
            return state
        columns = parameter.numel() // len(parameter)
        for name in MOMENTS:
            del state[name]
            state[f"{name}_codes"] = empty_rows(parameter, columns, torch.uint8)
            state[f"{name}_scales"] = empty_rows(parameter, math.ceil(columns / BLOCK), torch.float32)
        return state


def local(tensor: Any) -> Any:
    """What of a tensor is on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def empty_rows(parameter: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """A matrix with the parameter's rows, sharded as they are."""
    rows = local(parameter)
    matrix = torch.empty(len(rows), columns, dtype=dtype, device=rows.device)
    if not isinstance(parameter, DTensor):
        return matrix
    mesh, placements, shape = parameter.device_mesh, parameter.placements, torch.Size([len(parameter), columns])
    return DTensor.from_local(matrix, mesh, placements, run_check=False, shape=shape, stride=(columns, 1))


@cache
def code_values(moment: str, device: torch.device) -> Tensor:
    """The 256 values that codes stand for, rising: of both signs for the mean, from 0 up for the mean square.

    Seven decades down from 1, each with half as many values as the one above, as bitsandbytes' dynamic map.
    """
    signed = moment == MOMENTS[0]
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1, dtype=torch.float64)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        values += [*means.tolist(), *((-means).tolist() if signed else [])]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def quantize(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers R×C → codes R×C (uint8) of the nearest of `values`, and scales R×⌈C / 256⌉: each block's largest size."""
    blocks = F.pad(rows, (0, -rows.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    scales = blocks.abs().amax(-1)
    parts = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    codes = torch.bucketize(parts, (values[:-1] + values[1:]) / 2, out_int32=True)
    return codes.flatten(1)[:, : rows.shape[1]].to(torch.uint8), scales


def dequantize(codes: Tensor, scales: Tensor, values: Tensor) -> Tensor:
    """What `quantize` gave codes and scales for, to their precision; R×C."""
    return values[codes.int()] * scales.repeat_interleave(BLOCK, 1)[:, : codes.shape[1]]


def build_optimizer(trainable: list[nn.Parameter], config: OptimizerConfig) -> StageAdamW:
    """The optimizer; its rate is set before every step."""
    fused = (
        config.fused if config.fused is not None else all(parameter.device.type == "cuda" for parameter in trainable)
    )
    kind = StageAdamW8bit if config.eight_bit else StageAdamW
    return kind(
        trainable,
        lr=config.lr,
        betas=tuple(config.betas),
        eps=config.eps,
        eps_before_correction=config.eps_before_correction,
        weight_decay=config.weight_decay,
        fused=fused or None,
    )
