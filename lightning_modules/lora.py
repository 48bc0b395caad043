"""Low-rank updates of a multimodal language model (LoRA, Hu et al. 2021, arXiv 2106.09685), by peft.

Each linear map W of the decoder's layers becomes W + B·A, of which A and B train; W, norms and embeddings are frozen.
Checkpoints hold A and B alone; a model folder holds the sum, and is read as any other.
"""

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from kosmosg.models.image_decoder import with_values
from kosmosg.models.mllm import MultimodalLM


def add_lora(mllm: MultimodalLM, rank: int) -> None:
    """Give the decoder's linear maps that train updates of `rank`, which train in their place; B begins at 0.

    The scale α / rank is 1.
    """
    decoder = mllm.decoder
    names = [
        name for name, layer in decoder.named_modules() if isinstance(layer, nn.Linear) and layer.weight.requires_grad
    ]
    decoder.requires_grad_(False)
    with with_values():  # peft moves each update to the weight's device, which a dry run's tensors cannot be
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), decoder)


@torch.no_grad()
def merge_lora(mllm: MultimodalLM) -> None:
    """Add the updates to the weights, and take them away. The model is then as one that never had any."""
    for parent in list(mllm.decoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                child.merge()
                setattr(parent, name, child.get_base_layer())
