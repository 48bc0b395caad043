"""LoRA (Hu et al. 2021, arXiv 2106.09685) for the multimodal language model, by peft.

Each linear layer W of the language decoder becomes W + B·A. A and B are trained; W, norms and embeddings are frozen.
Checkpoints hold only A and B; a model folder holds the merged weights and loads like any other.
"""

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from kosmosg.models.image_decoder import with_values
from kosmosg.models.mllm import MultimodalLM


def add_lora(mllm: MultimodalLM, rank: int) -> None:
    """Freeze the language decoder and add LoRA of `rank` to its trainable linear layers, with scale α / rank = 1."""
    decoder = mllm.decoder
    names = [
        name for name, layer in decoder.named_modules() if isinstance(layer, nn.Linear) and layer.weight.requires_grad
    ]
    decoder.requires_grad_(False)
    with with_values():  # peft moves A and B to the weight's device, which fails for the fake tensors of a dry run
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), decoder)


@torch.no_grad()
def merge_lora(mllm: MultimodalLM) -> None:
    """Merge A and B into the weights and remove them, which leaves a plain model."""
    for parent in list(mllm.decoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                child.merge()
                setattr(parent, name, child.get_base_layer())
