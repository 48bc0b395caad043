"""FSDP2 applied from outside: each transformer layer, then each network, shards its parameters over the processes.

The models know nothing of it. Runs on any backend that torch.distributed has, also on CPU processes with gloo.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from kosmosg.models.mllm import MLLM
from kosmosg.prompt import PromptBatch

DATA_PARALLEL = "data_parallel"  # Lightning's name for the mesh dimension


def shard(networks: Sequence[nn.Module], mesh: DeviceMesh, precision: str = "32-true") -> None:
    """Shard every network over `mesh`, layer by layer; what is sharded already is left as it is.

    A layer list is a unit's boundary: its layers are gathered one at a time during forward and backward.

    Args:
        precision: Lightning's name of the run's precision, see `layer_policy`.
    """
    data = mesh[DATA_PARALLEL]
    policy = layer_policy(precision, data.device_type)
    for network in networks:
        if isinstance(network, FSDPModule):
            continue
        for module in list(network.modules()):
            if isinstance(module, nn.ModuleList):
                for layer in module:
                    if not isinstance(layer, FSDPModule):
                        fully_shard(layer, mesh=data, mp_policy=policy)
        fully_shard(network, mesh=data)


def layer_policy(precision: str, device_type: str) -> MixedPrecisionPolicy:
    """In which precision layers are gathered; gradients are always summed in float32.

    With mixed precision on a GPU the layers travel in half precision, half the traffic: autocast would cast their
    matrices to it all the same. What is outside layers (embeddings, positions, final norms) stays float32, and so does
    the residual stream, for inputs are not cast. On a CPU autocast leaves LayerNorm alone, which then needs its weights
    in float32 as its input is.
    """
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    if half is None or device_type == "cpu":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)


def with_blank_image_row(prompt: PromptBatch, mllm: MLLM) -> PromptBatch:
    """The batch with one more row, `<s>` and a blank image.

    Processes gather the parameters of the image tower, or reduce their gradients, together. One whose batch holds no
    image would not come to the meeting and all would hang; it reads a blank image instead, which its loss counts with
    weight 0.
    """
    slots, size = mllm.config.image_tokens, mllm.vision.image_size
    missing = max(0, 1 + slots - prompt.ids.shape[1])
    ids = F.pad(prompt.ids, (0, missing, 0, 1), value=mllm.config.pad_id)
    image_mask = F.pad(prompt.image_mask, (0, missing, 0, 1))
    padding = F.pad(prompt.padding, (0, missing, 0, 1), value=True)
    ids[-1, : 1 + slots] = mllm.config.bos_id
    image_mask[-1, 1 : 1 + slots] = True
    padding[-1, : 1 + slots] = False
    images = torch.zeros(1, 3, size, size, device=ids.device)
    return replace(prompt, ids=ids, image_mask=image_mask, padding=padding, images=images)
