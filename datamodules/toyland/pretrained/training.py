"""The loop that all tiny models share: AdamW, a warm-up and a long cosine to zero, averaged weights, time left.

It resumes: every few minutes all that it needs is written beside the drawn images.
"""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from kosmosg.files import replaced

SAVE_EVERY = 180.0
"""Seconds."""


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
    """Train `modules` in place on `loss(step) -> (scalar, figures to print)`, whose randomness comes from `draws`.

    Args:
        checkpoint: file to resume from, of the same recipe, `model-….pt`; it stays, so that a finished part is not
            trained twice.
        average: decay of a moving average of the weights, which replaces them at the end; 0 keeps the last.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    name = checkpoint.stem.partition("-")[0]
    network = nn.ModuleList(modules)
    weights = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    warm_up = max(min(200, steps // 10), 1)

    def rate(step: int) -> float:
        return min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * min(step / steps, 1))) + 1e-3)

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
        kept = torch.load(checkpoint, weights_only=True)
        first, spent, means = kept["step"], kept["seconds"], kept["means"]
        network.load_state_dict(kept["network"])
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
        averaged = kept["averaged"]
        draws.set_state(kept["draws"])
    began = saved = time.monotonic()
    for step in range(first, steps):
        value, figures = loss(step)
        if not torch.isfinite(value):
            raise FloatingPointError(f"{name}: the loss is {value.item()} at step {step}; lower the learning rate")
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
            told = "  ".join(f"{key} {figure:.4f}" for key, figure in means.items())
            print(f"{name}  step {step + 1}/{steps}  {told}  {left / 60:.1f} min left", flush=True)
        if now - saved > SAVE_EVERY or step + 1 == steps:
            saved = now
            with replaced(checkpoint) as temporary:
                torch.save(state(step + 1, seconds), temporary)
    with torch.no_grad():
        for weight, mean_weight in zip(weights, averaged, strict=bool(averaged)):
            weight.copy_(mean_weight)
    network.eval()
