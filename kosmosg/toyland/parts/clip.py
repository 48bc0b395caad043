"""CLIP in miniature: one text tower and one image tower, trained to find each other's captions and pictures."""

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from kosmosg.toyland.parts.pool import Pool
from kosmosg.toyland.parts.training import fit
from kosmosg.toyland.scene import SIZE

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


def normalized(images: torch.Tensor) -> torch.Tensor:
    """uint8 → CLIP's input."""
    return (images.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def train_clip(
    pool: Pool, tokenizer: CLIPTokenizer, *, steps: int, batch_size: int, lr: float, seed: int, name: str = "clip"
) -> CLIPModel:
    """InfoNCE in both directions between captions and pictures."""
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
