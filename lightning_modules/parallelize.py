"""FSDP2, activation checkpointing, compilation, smaller frozen weights, all from outside: the networks do not know.

A layer is an entry of one of a network's module lists; of the frozen denoiser, which the gradient of stage 3 passes
through, it is what diffusers can checkpoint and compile. Checkpointing is PyTorch's non-reentrant one: the reentrant
one of the released code left CLIP's last block without a gradient, because nothing before it asks for one.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.utils.parametrize import ParametrizationList, register_parametrization
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kosmosg.models.image_decoder import ImageDecoder

DATA_PARALLEL = "data_parallel"  # Lightning's name for the mesh dimension
ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
)
FLOAT8_DTYPE = torch.float8_e4m3fn
FLOAT8 = torch.finfo(FLOAT8_DTYPE)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution")
SAVED = {getattr(torch.ops.aten, name).default for name in (*ATTENTION, *PRODUCTS) if hasattr(torch.ops.aten, name)}
# One limit counts the graphs of all layers of a class: widths, with a gradient and without, of fixed and of changing
# length. Stages 2 and 3 pass the default of 8, and their last layers would then run uncompiled.
COMPILED_GRAPHS = 64


def shard(networks: Sequence[nn.Module], mesh: DeviceMesh, precision: str) -> None:
    """Shard every network over `mesh`, layer by layer; what is sharded already is left as it is.

    Gradients are summed in float32. With mixed precision on a GPU the layers travel in half precision, half the
    traffic: autocast would cast their matrices anyway. What is outside of layers (embeddings, positions, final norms)
    stays float32, and so does the residual stream. On a CPU autocast leaves LayerNorm alone, which then needs float32.

    Args:
        precision: Lightning's name of the run's precision.
    """
    data = mesh[DATA_PARALLEL]
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    if half is not None and data.device_type != "cpu":
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for network in networks:
        if isinstance(network, FSDPModule):
            continue
        for layer in layers(network):
            fully_shard(layer, mesh=data, mp_policy=policy)
        fully_shard(network, mesh=data, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))


def apply_activation_checkpointing(module: nn.Module, mode: str) -> None:
    """Let the backward pass compute layers again, by `trainer.activation_checkpointing`.

    Args:
        mode: none; selective saves the results of matrix products, convolutions and attention; full saves a layer's
            input alone.
    """
    if mode == "none":
        return
    again: Callable[..., Any] = partial(checkpoint, use_reentrant=False)
    if mode == "selective":
        again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, _save_products))
    for layer in layers(module):
        if any(parameter.requires_grad for parameter in layer.parameters()):
            layer.forward = _with_gradient(layer.forward, again)
    for denoiser in denoisers(module):
        denoiser.enable_gradient_checkpointing(lambda block, *arguments: again(block.__call__, *arguments))


def apply_compile(module: nn.Module, **options: Any) -> None:
    """Compile every layer's forward; sharding's hooks stay outside. `options` go to torch.compile."""
    torch._dynamo.config.recompile_limit = max(COMPILED_GRAPHS, torch._dynamo.config.recompile_limit)
    for layer in layers(module):
        layer.forward = torch.compile(layer.forward, **options)
    for denoiser in denoisers(module):
        denoiser.compile_repeated_blocks(**options)


def store_frozen_weights(module: nn.Module, storage: str, skipped: Sequence[nn.Module] = ()) -> None:
    """Keep the frozen weights of linear maps and convolutions in fewer bits; each is float32 again while it is used.

    With bfloat16 under bf16-mixed nothing changes, since autocast would cast them so each time. float8 (e4m3, with a
    scale for each output) rounds the denoiser's to four significant bits. Autoencoders, whose latents are the targets,
    stay as they are.

    Args:
        storage: float32, which changes nothing; bfloat16; or float8 for the denoiser and bfloat16 for the others.
        skipped: networks that stay as they are.
    """
    if storage == "float32":
        return
    decoders = [child for child in module.modules() if isinstance(child, ImageDecoder)]
    whole = {id(part) for network in (*skipped, *(each.autoencoder for each in decoders)) for part in parts_of(network)}
    eighths = {id(part) for decoder in decoders for part in parts_of(decoder.denoiser)}
    for layer in list(module.modules()):
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or layer.weight.requires_grad or id(layer) in whole:
            continue
        weight = layer.weight.data
        del layer.weight  # as a buffer it does not count as what the network computes in
        layer.register_buffer("weight", weight)
        small = StoredWeight("float8" if storage == "float8" and id(layer) in eighths else "bfloat16")
        register_parametrization(layer, "weight", small, unsafe=True)


def parts_of(network: nn.Module | None) -> Iterator[nn.Module]:
    """All modules of a network that may not be loaded."""
    return iter(()) if network is None else network.modules()


def stored_weights(module: nn.Module) -> Iterator[Tensor]:
    """What `store_frozen_weights` keeps, but for the scales."""
    for part in module.modules():
        if isinstance(part, ParametrizationList) and isinstance(part[0], StoredWeight):
            yield part.original if hasattr(part, "original") else part.original0  # type: ignore[misc]


class StoredWeight(nn.Module):
    """A weight in fewer bits. diffusers' layerwise casting has no scales, and fails in the backward pass of layers that
    are not checkpointed: their weights are small again by then."""

    def __init__(self, storage: str):
        super().__init__()
        self.storage = storage

    def right_inverse(self, weight: Tensor) -> list[Tensor]:
        """Weight O×… → stored, and the scale of each output."""
        if self.storage == "bfloat16":
            return [weight.bfloat16()]
        scale = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True).clamp(min=FLOAT8.tiny) / FLOAT8.max
        return [(weight / scale).to(FLOAT8_DTYPE), scale]

    def forward(self, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        return weight.float() if scale is None else weight.float() * scale


def layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of all networks but the image side of image decoders, whose lists are of other things."""
    image_side = (module.denoiser, module.autoencoder) if isinstance(module, ImageDecoder) else ()
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif not any(child is network for network in image_side):
            yield from layers(child)


def denoisers(module: nn.Module) -> list[Any]:
    """The denoisers of the image decoders below `module`."""
    decoders = (child for child in module.modules() if isinstance(child, ImageDecoder))
    return [decoder.denoiser for decoder in decoders if decoder.denoiser is not None]


def _with_gradient(forward: Callable[..., Any], again: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` through `again` where a gradient is wanted."""

    def checkpointed(*arguments: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **keywords)
        return again(forward, *arguments, **keywords)

    return checkpointed


def _save_products(context: Any, operator: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    """Norms, activations, dropout and sums are cheap to compute again."""
    return CheckpointPolicy.MUST_SAVE if operator in SAVED else CheckpointPolicy.PREFER_RECOMPUTE
