"""Recomputation and compilation of layers, applied from outside: the models know nothing of it, nor do state dicts.

A layer is an entry of one of a network's module lists; of the frozen U-Net, which the gradient of stage 3 passes
through, it is what diffusers makes recomputable and compilable. Recomputation is PyTorch's non-reentrant one: the
reentrant one of the released code left CLIP's last block without a gradient, because nothing before it asks for one.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution")
FORMS = 64
KEPT = {getattr(torch.ops.aten, name).default for name in (*ATTENTION, *PRODUCTS) if hasattr(torch.ops.aten, name)}


def apply_recompute(module: nn.Module, mode: str) -> None:
    """Let the backward pass compute layers again, by `trainer.recompute`.

    Args:
        mode: none; selective keeps the results of matrix products, convolutions and attention; full keeps a layer's
            input alone.
    """
    if mode == "none":
        return
    again = partial(checkpoint, use_reentrant=False)
    if mode == "selective":
        again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, keep_products))
    for layer in layers(module):
        if any(parameter.requires_grad for parameter in layer.parameters()):
            layer.forward = in_training(layer, layer.forward, again)
    for unet in unets(module):
        unet.enable_gradient_checkpointing(lambda block, *arguments: again(block.__call__, *arguments))


def apply_compile(module: nn.Module, **options: Any) -> None:
    """Compile every layer's forward; sharding's hooks stay outside. `options` go to torch.compile."""
    # One limit counts the forms of all layers of a class: widths, with a gradient and without, of fixed and of changing
    # length. The default of 8 is passed by stages 2 and 3, whose last layers would then run uncompiled.
    torch._dynamo.config.recompile_limit = max(FORMS, torch._dynamo.config.recompile_limit)
    for layer in layers(module):
        layer.forward = torch.compile(layer.forward, **options)
    for unet in unets(module):
        unet.compile_repeated_blocks(**options)


def layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of all networks but U-Nets and VAEs, whose lists are of other things."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif not isinstance(child, UNet2DConditionModel) and type(child).__name__ != "AutoencoderKL":
            yield from layers(child)


def unets(module: nn.Module) -> list[UNet2DConditionModel]:
    """The U-Nets below `module`."""
    return [child for child in module.modules() if isinstance(child, UNet2DConditionModel)]


def in_training(layer: nn.Module, forward: Callable[..., Any], again: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` through `again` where a gradient is wanted."""

    def recomputed(*arguments: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **keywords)
        return again(forward, *arguments, **keywords)

    return recomputed


def keep_products(context: Any, operator: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    """Keep what is dear to compute; norms, activations, dropout and sums are cheap."""
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
