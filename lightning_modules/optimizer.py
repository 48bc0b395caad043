"""AdamW with linear warmup and linear decay to zero (paper section 3.2), for all stages.

As in the released code (docs/released-code.md, "Optimiser"), step n (from 1) uses the schedule's value at n − 1, so the
first step has learning rate 0, and eps is added to sqrt(v) before the bias correction. PyTorch adds it afterwards; the
two are equivalent with eps / sqrt(1 − β₂ᵗ), which is set before each step.

With `eight_bit` the moments are stored in 8 bits (Dettmers et al. 2022, arXiv 2110.02861): codes for a table of 256
values, denser near 0, and a scale for each block of 256 elements of a row. Blocks do not cross rows, so each FSDP2
shard has whole blocks and a checkpoint can be loaded by any number of ranks.
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
MIN_QUANTIZED = 4096  # elements; the moments of smaller parameters stay in float32


@dataclass
class OptimizerConfig:
    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates β₁, β₂ of the moments."""
    eps: float = 1e-6
    """Added to the square root of the second moment."""
    eps_before_correction: bool = True
    """Add eps before the bias correction, as in the released code; false: after it, as in PyTorch."""
    weight_decay: float = 0.01
    """Decoupled weight decay of all trainable parameters, including biases and norms as in the released code."""
    warmup_steps: int = 375
    """Steps of linear warmup to `lr`, followed by linear decay to 0 at trainer.max_steps."""
    fused: bool | None = None
    """Use PyTorch's fused AdamW; null: on GPUs only. On a CPU it changes the last bits."""
    eight_bit: bool = False
    """Store the moments in 8 bits: 2 bytes per trainable parameter instead of 8."""
    max_grad_norm: float = 2.0
    """Gradients with a larger global norm are scaled down to this norm."""

    def __post_init__(self) -> None:
        for name, value, valid, allowed in (
            ("lr", self.lr, self.lr > 0, "above 0"),
            ("betas", self.betas, all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)"),
            ("eps", self.eps, self.eps > 0, "above 0"),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more"),
            ("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "0 or more"),
            ("max_grad_norm", self.max_grad_norm, self.max_grad_norm > 0, "above 0"),
        ):
            if not valid:
                raise ValueError(f"optimizer.{name} is {value}; allowed: {allowed}")


def learning_rate_factor(finished: int, warmup_steps: int, max_steps: int) -> float:
    """Return the learning rate after `finished` optimizer steps, as a share of the peak."""
    if finished < warmup_steps:
        return finished / warmup_steps
    return max(0.0, (max_steps - finished) / max(1, max_steps - warmup_steps))


class StageAdamW(AdamW):
    """AdamW with eps before or after the bias correction. A skipped step, without any gradient, changes nothing.

    Args:
        eps_before_correction: see `OptimizerConfig`.
        options: options of AdamW.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, eps: float, eps_before_correction: bool, **options: Any):
        super().__init__(parameters, eps=eps, **options)
        self.configured_eps, self.eps_before_correction = eps, eps_before_correction
        # Makes the loss scaler unscale gradients before `step`, because they are clipped there.
        self._step_supports_amp_scaling = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run an optimizer step; `closure` computes loss and gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if any(parameter.grad is not None for parameter in parameters):
            if self.eps_before_correction:
                # All trainable parameters have a gradient in every step, so they share one step count.
                finished = next((int(self.state[p]["step"]) for p in parameters if "step" in self.state[p]), 0)
                for group in self.param_groups:
                    group["eps"] = self.configured_eps / math.sqrt(1 - group["betas"][1] ** (finished + 1))
            self.update()
        return loss

    def update(self) -> None:
        """Update parameters and moments."""
        super().step()

    def empty_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return an uninitialised state of a parameter, to be loaded from a checkpoint."""
        step = torch.empty((), device=parameter.device if self.defaults["fused"] else "cpu")
        return {"step": step, **{name: torch.empty_like(parameter).detach() for name in MOMENTS}}


class StageAdamW8bit(StageAdamW):
    """StageAdamW with moments in 8 bits. Those of vectors and small parameters stay in float32."""

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
        """Return a moment of a parameter in float32."""
        if name in state:
            return local(state[name])
        codes, scales = (local(state[f"{name}_{part}"]) for part in ("codes", "scales"))
        return dequantize(codes, scales, code_values(name, codes.device)).view_as(weight)

    def empty_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = super().empty_state(parameter)
        if parameter.ndim < 2 or parameter.numel() < MIN_QUANTIZED:
            return state
        columns = parameter.numel() // len(parameter)
        for name in MOMENTS:
            del state[name]
            state[f"{name}_codes"] = empty_rows(parameter, columns, torch.uint8)
            state[f"{name}_scales"] = empty_rows(parameter, math.ceil(columns / BLOCK), torch.float32)
        return state


def local(tensor: Any) -> Any:
    """Return this rank's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def empty_rows(parameter: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised matrix with one row per row of the parameter, sharded in the same way."""
    rows = local(parameter)
    matrix = torch.empty(len(rows), columns, dtype=dtype, device=rows.device)
    if not isinstance(parameter, DTensor):
        return matrix
    mesh, placements, shape = parameter.device_mesh, parameter.placements, torch.Size([len(parameter), columns])
    return DTensor.from_local(matrix, mesh, placements, run_check=False, shape=shape, stride=(columns, 1))


@cache
def code_values(moment: str, device: torch.device) -> Tensor:
    """Return the 256 values of the codes, ascending: signed for the first moment, non-negative for the second.

    As in bitsandbytes' dynamic map, they cover seven decades below 1, each with half as many values as the next larger.
    """
    signed = moment == MOMENTS[0]
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1, dtype=torch.float64)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        values += [*means.tolist(), *((-means).tolist() if signed else [])]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def quantize(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize R×C to codes R×C (uint8) of the nearest `values`, and scales R×⌈C / 256⌉: the maximum of each block."""
    blocks = F.pad(rows, (0, -rows.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    scales = blocks.abs().amax(-1)
    parts = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    codes = torch.bucketize(parts, (values[:-1] + values[1:]) / 2, out_int32=True)
    return codes.flatten(1)[:, : rows.shape[1]].to(torch.uint8), scales


def dequantize(codes: Tensor, scales: Tensor, values: Tensor) -> Tensor:
    """Invert `quantize`, up to rounding; returns R×C."""
    return values[codes.int()] * scales.repeat_interleave(BLOCK, 1)[:, : codes.shape[1]]


def build_optimizer(trainable: list[nn.Parameter], config: OptimizerConfig) -> StageAdamW:
    """Build the optimizer. `StageModule.training_step` sets its learning rate before every step."""
    fused = (
        config.fused if config.fused is not None else all(parameter.device.type == "cuda" for parameter in trainable)
    )
    optimizer = StageAdamW8bit if config.eight_bit else StageAdamW
    return optimizer(
        trainable,
        lr=config.lr,
        betas=tuple(config.betas),
        eps=config.eps,
        eps_before_correction=config.eps_before_correction,
        weight_decay=config.weight_decay,
        fused=fused or None,
    )
