"""AdamW with linear warm-up and linear decay to zero (paper section 3.2), the same in all stages.

Step n (from 1) uses the schedule's value at n − 1, so the first step has rate 0, as in the released code
(released-code.md, "Optimiser"). Its Adam adds eps to sqrt(v) before the bias correction, PyTorch's after: that is
PyTorch's with eps / sqrt(1 − β₂ᵗ), which is set before each step.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW


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
            super().step()
        return loss


def build_optimizer(trainable: list[nn.Parameter], config: OptimizerConfig) -> StageAdamW:
    """The optimizer; its rate is set before every step."""
    fused = (
        config.fused if config.fused is not None else all(parameter.device.type == "cuda" for parameter in trainable)
    )
    return StageAdamW(
        trainable,
        lr=config.lr,
        betas=tuple(config.betas),
        eps=config.eps,
        eps_before_correction=config.eps_before_correction,
        weight_decay=config.weight_decay,
        fused=fused or None,
    )
