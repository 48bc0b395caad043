"""Apply FSDP2, activation checkpointing, compilation and reduced storage of frozen weights to a stage's networks.

All are applied from outside, so that the networks themselves stay plain PyTorch. A layer is an entry of a network's
`nn.ModuleList`; for the frozen denoiser, diffusers' own methods select the blocks. Activation checkpointing is
non-reentrant: the released code's reentrant one gave CLIP's last block no gradient, because no input of it needs one.
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
# The limit applies to all layers of a class together: each width, with and without gradient, with static and dynamic
# length, is a graph. Stages 2 and 3 exceed the default of 8, after which layers would run uncompiled.
COMPILED_GRAPHS = 64


def shard(networks: Sequence[nn.Module], mesh: DeviceMesh, precision: str) -> None:
    """Shard the networks over `mesh`, layer by layer. Networks that are sharded already are skipped.

    Gradients are reduced in float32. With mixed precision on a GPU, layers are gathered in half precision, which halves
    the traffic; autocast would cast their matrices anyway. Parameters outside of layers (embeddings, positions, final
    norms) and the residual stream stay float32. On a CPU layers do, too: autocast does not cast LayerNorm there.

    Args:
        precision: the run's precision, as Lightning names it.
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
    """Recompute activations of layers in the backward pass.

    Args:
        mode: `none`; `selective` keeps the outputs of matrix products, convolutions and attention; `full` keeps only
            the inputs of layers.
    """
    if mode == "none":
        return
    recompute: Callable[..., Any] = partial(checkpoint, use_reentrant=False)
    if mode == "selective":
        recompute = partial(recompute, context_fn=partial(create_selective_checkpoint_contexts, _save_products))
    for layer in layers(module):
        if any(parameter.requires_grad for parameter in layer.parameters()):
            layer.forward = _checkpointed(layer.forward, recompute)
    for denoiser in denoisers(module):
        denoiser.enable_gradient_checkpointing(lambda block, *arguments: recompute(block.__call__, *arguments))


def apply_compile(module: nn.Module, **options: Any) -> None:
    """Compile the forward of every layer, without the hooks of FSDP2. `options` go to torch.compile."""
    torch._dynamo.config.recompile_limit = max(COMPILED_GRAPHS, torch._dynamo.config.recompile_limit)
    for layer in layers(module):
        layer.forward = torch.compile(layer.forward, **options)
    for denoiser in denoisers(module):
        denoiser.compile_repeated_blocks(**options)


def store_frozen_weights(module: nn.Module, storage: str, skipped: Sequence[nn.Module] = ()) -> None:
    """Store frozen linear and convolution weights in fewer bits; they are converted to float32 on use.

    bfloat16 does not change results under bf16-mixed, since autocast casts these weights anyway. float8 (e4m3, with a
    scale per output channel) rounds to four significant bits. Autoencoders are skipped, since they make the targets.

    Args:
        storage: `float32`, which does nothing; `bfloat16`; or `float8`: float8 for denoisers, bfloat16 for the others.
        skipped: networks to leave as they are.
    """
    if storage == "float32":
        return
    decoders = [child for child in module.modules() if isinstance(child, ImageDecoder)]
    networks = (*skipped, *(decoder.autoencoder for decoder in decoders))
    excluded = {id(part) for network in networks if network is not None for part in network.modules()}
    in_denoiser = {id(part) for denoiser in denoisers(module) for part in denoiser.modules()}
    for layer in list(module.modules()):
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or layer.weight.requires_grad or id(layer) in excluded:
            continue
        weight = layer.weight.data
        del layer.weight  # a buffer instead, so that the network's dtype is still that of its other parameters
        layer.register_buffer("weight", weight)
        stored = StoredWeight("float8" if storage == "float8" and id(layer) in in_denoiser else "bfloat16")
        register_parametrization(layer, "weight", stored, unsafe=True)


def stored_weights(module: nn.Module) -> Iterator[Tensor]:
    """Yield the weights that `store_frozen_weights` has converted, without their scales."""
    for part in module.modules():
        if isinstance(part, ParametrizationList) and isinstance(part[0], StoredWeight):
            yield part.original if hasattr(part, "original") else part.original0  # type: ignore[misc]


class StoredWeight(nn.Module):
    """Parametrization that stores a weight in fewer bits. diffusers' layerwise casting has no scales, and fails in the
    backward pass of layers without checkpointing, whose weights are cast back before it."""

    def __init__(self, storage: str):
        super().__init__()
        self.storage = storage

    def right_inverse(self, weight: Tensor) -> list[Tensor]:
        """Convert a weight O×… to its stored form and, for float8, the scale of each output channel."""
        if self.storage == "bfloat16":
            return [weight.bfloat16()]
        scale = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True).clamp(min=FLOAT8.tiny) / FLOAT8.max
        return [(weight / scale).to(FLOAT8_DTYPE), scale]

    def forward(self, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        return weight.float() if scale is None else weight.float() * scale


def layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of all networks, except those of denoisers and autoencoders of image decoders."""
    image_side = (module.denoiser, module.autoencoder) if isinstance(module, ImageDecoder) else ()
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif not any(child is network for network in image_side):
            yield from layers(child)


def denoisers(module: nn.Module) -> list[Any]:
    """Return the denoisers of all image decoders in `module`."""
    decoders = (child for child in module.modules() if isinstance(child, ImageDecoder))
    return [decoder.denoiser for decoder in decoders if decoder.denoiser is not None]


def _checkpointed(forward: Callable[..., Any], recompute: Callable[..., Any]) -> Callable[..., Any]:
    """Apply activation checkpointing to `forward` when gradients are enabled."""

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **keywords)
        return recompute(forward, *arguments, **keywords)

    return wrapped


def _save_products(context: Any, operator: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    """Policy of selective checkpointing: norms, activation functions, dropout and sums are cheap to recompute."""
    return CheckpointPolicy.MUST_SAVE if operator in SAVED else CheckpointPolicy.PREFER_RECOMPUTE
