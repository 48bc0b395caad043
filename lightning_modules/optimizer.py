"""AdamW with linear warm-up and linear decay to zero (paper section 3.2), the same in all stages.

First update: update number n (from 1) uses the schedule's value at n − 1, so the first update has rate 0, as in the
released code (golden README, "Optimiser"). Its Adam adds eps to sqrt(v) before the bias correction, PyTorch's after:
that is PyTorch's with eps / sqrt(1 − β₂ᵗ), which is set before each update. PyTorch reads eps anew in every update, so
its foreach and fused kernels do the work either way.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


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
    """Decoupled decay of every trained parameter, biases and norms too (as the released code)."""
    warm_up_steps: int = 375
    """Updates over which the rate rises linearly to `lr`; then it falls linearly to 0 at trainer.max_steps."""
    fused: bool | None = None
    """One kernel for the whole update; null takes it on a GPU. On a CPU it changes the last bits."""
    clip: float = 2.0
    """Largest norm of the whole gradient; longer ones are scaled down to it."""

    def __post_init__(self) -> None:
        for name, value, right, allowed in (
            ("lr", self.lr, self.lr > 0, "above 0"),
            ("betas", self.betas, all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)"),
            ("eps", self.eps, self.eps > 0, "above 0"),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more"),
            ("warm_up_steps", self.warm_up_steps, self.warm_up_steps >= 0, "0 or more"),
            ("clip", self.clip, self.clip > 0, "above 0"),
        ):
            if not right:
                raise ValueError(f"optimizer.{name} is {value}; allowed: {allowed}")


def learning_rate_factor(updates: int, warm_up_steps: int, max_steps: int) -> float:
    """Share of the peak rate after `updates` finished updates: linear up, then linear to 0 at `max_steps`."""
    if updates < warm_up_steps:
        return updates / warm_up_steps
    return max(0.0, (max_steps - updates) / max(1, max_steps - warm_up_steps))


class StageAdamW(AdamW):
    """AdamW with a choice where eps goes; an update without any gradient, as a skipped one is, changes nothing.

    Args:
        eps_before_correction: see `OptimizerConfig`.
        options: of AdamW.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, eps: float, eps_before_correction: bool, **options: Any):
        super().__init__(parameters, eps=eps, **options)
        self.own_eps, self.eps_before_correction = eps, eps_before_correction
        # The gradients are clipped before the update, so a loss scaler must have scaled them back by then.
        self._step_supports_amp_scaling = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; `closure` computes loss and gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(parameter.grad is not None for group in self.param_groups for parameter in group["params"]):
            if self.eps_before_correction:
                self._correct_eps()
            super().step()
        return loss

    def _correct_eps(self) -> None:
        """Set each group's eps so that the coming update equals one that adds eps before the bias correction."""
        for group in self.param_groups:
            group["updates"] = group.get("updates", 0) + 1  # kept in checkpoints, as all of a group
            group["eps"] = self.own_eps / math.sqrt(1 - group["betas"][1] ** group["updates"])


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, max_steps: int
) -> tuple[StageAdamW, LambdaLR]:
    """The optimiser over what trains, and its schedule, to be stepped after every update."""
    trained = list(parameters)
    fused = config.fused if config.fused is not None else all(parameter.device.type == "cuda" for parameter in trained)
    optimizer = StageAdamW(
        trained,
        lr=config.lr,
        betas=tuple(config.betas),
        eps=config.eps,
        eps_before_correction=config.eps_before_correction,
        weight_decay=config.weight_decay,
        fused=fused or None,
    )
    schedule = LambdaLR(optimizer, lambda updates: learning_rate_factor(updates, config.warm_up_steps, max_steps))
    return optimizer, schedule
