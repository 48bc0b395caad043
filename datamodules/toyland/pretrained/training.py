"""Training loop of the tiny models: AdamW, warmup and cosine decay, weight averaging, and resumable checkpoints."""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from kosmosg.files import replaced

SAVE_EVERY = 180.0
"""Seconds between checkpoints."""


def fit(
    checkpoint: Path,
    modules: Iterable[nn.Module],
    loss: Callable[[int], tuple[Tensor, dict[str, float]]],
    draws: torch.Generator,
    *,
    steps: int,
    lr: float,
    weight_decay: float = 0.01,
    average: float = 0.0,
    log_every: int = 100,
) -> None:
    """Train `modules` in place on `loss(step) -> (scalar, figures to print)`, whose random numbers come from `draws`.

    Args:
        checkpoint: file `model-….pt` to resume from; it is kept, so that a finished model is not trained again.
        average: decay of a moving average of the weights, which replaces them at the end; 0 disables it.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    name = checkpoint.stem.partition("-")[0]
    network = nn.ModuleList(modules)
    weights = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    warmup_steps = max(min(200, steps // 10), 1)

    def rate(step: int) -> float:
        return min((step + 1) / warmup_steps, 0.5 * (1 + math.cos(math.pi * min(step / steps, 1))) + 1e-3)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    averaged = [w.detach().clone() for w in weights] if average else []
    means: dict[str, float] = {}
    first, spent = 0, 0.0

    def state(step: int, seconds: float) -> dict:
        return {
            "step": step, "seconds": seconds, "network": network.state_dict(), "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(), "averaged": averaged, "draws": draws.get_state(), "means": means,
        }  # fmt: skip

    if checkpoint.exists():
        saved_state = torch.load(checkpoint, weights_only=True)
        first, spent, means = saved_state["step"], saved_state["seconds"], saved_state["means"]
        network.load_state_dict(saved_state["network"])
        optimizer.load_state_dict(saved_state["optimizer"])
        schedule.load_state_dict(saved_state["schedule"])
        averaged = saved_state["averaged"]
        draws.set_state(saved_state["draws"])
    began = saved = time.monotonic()
    for step in range(first, steps):
        value, figures = loss(step)
        if not torch.isfinite(value):
            raise FloatingPointError(f"{name}: the loss is {value.item()} at step {step}; decrease the learning rate")
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if averaged:
            decay = min(average, (1 + step) / (10 + step))
            torch._foreach_lerp_(averaged, [w.detach() for w in weights], 1 - decay)
        for key, figure in {"loss": value.item(), **figures}.items():
            means[key] = figure + (means.get(key, figure) - figure) * 0.98
        now = time.monotonic()
        seconds = spent + now - began
        if (step + 1) % log_every == 0 or step + 1 == steps:
            left = seconds / (step + 1) * (steps - step - 1)
            shown = "  ".join(f"{key} {figure:.4f}" for key, figure in means.items())
            print(f"{name}  step {step + 1}/{steps}  {shown}  {left / 60:.1f} min left", flush=True)
        if now - saved > SAVE_EVERY or step + 1 == steps:
            saved = now
            with replaced(checkpoint) as temporary:
                torch.save(state(step + 1, seconds), temporary)
    with torch.no_grad():
        for weight, mean_weight in zip(weights, averaged, strict=bool(averaged)):
            weight.copy_(mean_weight)
    network.eval()
