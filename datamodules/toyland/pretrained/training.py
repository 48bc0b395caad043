"""The loop that all tiny models share: AdamW, a warm-up and a long cosine to zero, averaged weights, time left."""

import math
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def fit(
    name: str,
    modules: Iterable[nn.Module],
    loss: Callable[[int], tuple[Tensor, dict[str, float]]],
    *,
    steps: int,
    lr: float,
    weight_decay: float = 0.01,
    average: float = 0.0,
    log_every: int = 100,
) -> None:
    """Train `modules` in place on `loss(step) -> (scalar, figures to print)`.

    Args:
        average: decay of a moving average of the weights, which replaces them at the end; 0 keeps the last.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    modules = list(modules)
    weights = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    warm_up = max(min(200, steps // 10), 1)

    def rate(step: int) -> float:
        return min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * min(step / steps, 1))) + 1e-3)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    averaged = [w.detach().clone() for w in weights] if average else []
    began, mean = time.monotonic(), 0.0
    for step in range(steps):
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
        mean = value.item() if step == 0 else mean + (value.item() - mean) * max(0.02, 1 / (step + 1))
        if (step + 1) % log_every == 0 or step + 1 == steps:
            spent = time.monotonic() - began
            left = spent / (step + 1) * (steps - step - 1)
            told = "  ".join(f"{key} {figure:.3f}" for key, figure in figures.items())
            print(f"{name}  step {step + 1}/{steps}  loss {mean:.4f}  {told}  {left / 60:.1f} min left", flush=True)
    with torch.no_grad():
        for weight, mean_weight in zip(weights, averaged, strict=bool(averaged)):
            weight.copy_(mean_weight)
    for module in modules:
        module.eval()
