"""The encoders in miniature: CLIP, which the MLLM sees with, and the evaluation networks.

CLIP's text and vision encoder are trained to find each other's captions and images. The evaluation networks are a
DINO-like ViT, which recognises a subject, and a classifier whose features serve FID.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTModel,
)

from datamodules.toyland.pretrained.data import LABELS, Pool, pixels
from datamodules.toyland.pretrained.training import fit
from datamodules.toyland.scene import SIZE

TEMPERATURE = 0.1
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=SIZE // 8,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=64,
    )
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def normalized(images: Tensor) -> Tensor:
    """uint8 → CLIP's input."""
    return (images.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def train_clip(
    pool: Pool, tokenizer: CLIPTokenizer, *, steps: int, batch_size: int, lr: float, seed: int, name: str = "clip"
) -> CLIPModel:
    """InfoNCE in both directions between captions and images."""
    torch.manual_seed(seed)
    clip = build_clip(tokenizer)
    draws = torch.Generator().manual_seed(seed)
    length = tokenizer.model_max_length
    ids = torch.tensor(tokenizer(pool.captions, padding="max_length", truncation=True, max_length=length).input_ids)

    def loss(step: int):
        rows = torch.randint(len(pool), (batch_size,), generator=draws)
        with torch.autocast("cpu", torch.bfloat16):
            output = clip(input_ids=ids[rows], pixel_values=normalized(pool.images[rows]))
        logits = output.logits_per_image.float()
        # Two rows with one caption are no negatives of each other.
        same = (ids[rows][:, None] == ids[rows][None]).all(-1) & ~torch.eye(batch_size, dtype=torch.bool)
        logits = logits.masked_fill(same, -1e4)
        target = torch.arange(batch_size)
        hit = (logits.argmax(-1) == target).float().mean()
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2, {"top-1": hit.item()}

    fit(name, [clip], loss, steps=steps, lr=lr, weight_decay=0.05, average=0.99)
    return clip


def train_dino(pairs: Tensor, *, steps: int, batch_size: int, lr: float, seed: int) -> ViTModel:
    """Self-supervised: two images of one subject, elsewhere and in another pose, are nearer than any other two.

    DINO proper reaches this by self-distillation over crops; a contrastive loss on the same CLS output trains in
    minutes. What counts for the metric is kept: no class labels, so two cats of one batch are told apart.
    """
    torch.manual_seed(seed)
    sizes = ViTConfig(
        image_size=SIZE,
        patch_size=SIZE // 8,
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=3,
        layer_norm_eps=1e-6,
    )
    vit = ViTModel(sizes, add_pooling_layer=False)
    draws = torch.Generator().manual_seed(seed)

    def loss(step: int):
        rows = torch.randint(len(pairs), (batch_size,), generator=draws)
        both = pairs[rows].flatten(0, 1)
        flip = torch.rand(len(both), generator=draws) < 0.5
        both = torch.where(flip[:, None, None, None], both.flip(-1), both)
        with torch.autocast("cpu", torch.bfloat16):
            features = vit(pixel_values=pixels(both)).last_hidden_state[:, 0].float()
        features = F.normalize(features, dim=-1).view(batch_size, 2, -1)
        logits = features[:, 0] @ features[:, 1].T / TEMPERATURE
        target = torch.arange(batch_size)
        hit = (logits.argmax(-1) == target).float().mean()
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2, {"top-1": hit.item()}

    fit("dino", [vit], loss, steps=steps, lr=lr, weight_decay=0.05, average=0.99)
    return vit


def train_fid_network(pool: Pool, *, steps: int, batch_size: int, lr: float, seed: int) -> ResNetForImageClassification:
    """A small ResNet that names kind, setting, light, style and pattern and measures colours, all from one feature."""
    torch.manual_seed(seed)
    groups = [len(names) for names in LABELS.values()]
    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        num_labels=sum(groups),
        id2label=dict(enumerate(f"{group}: {name or 'plain'}" for group, names in LABELS.items() for name in names)),
    )
    network = ResNetForImageClassification(config)
    # Dropped afterwards: it makes the feature see colour.
    tints = nn.Linear(config.hidden_sizes[-1], pool.tints.shape[1])
    draws = torch.Generator().manual_seed(seed)

    def loss(step: int):
        rows = torch.randint(len(pool), (batch_size,), generator=draws)
        feature = network.resnet(pixels(pool.images[rows])).pooler_output.flatten(1)
        logits = network.classifier(feature).split(groups, dim=-1)
        named = sum(F.cross_entropy(part, pool.labels[rows, i]) for i, part in enumerate(logits))
        hit = (logits[0].argmax(-1) == pool.labels[rows, 0]).float().mean()
        return named + 5 * F.l1_loss(tints(feature), pool.tints[rows]), {"kind": hit.item()}

    fit("fid", [network, tints], loss, steps=steps, lr=lr)
    return network
