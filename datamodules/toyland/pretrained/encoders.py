"""Training of the tiny encoders: CLIP, whose vision encoder the MLLM uses, and the evaluation networks.

The evaluation networks are a DINO-like ViT, which recognises subjects, and a judge, whose features are used for FID.
"""

from pathlib import Path

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

from datamodules.toyland.brush import PATTERNS
from datamodules.toyland.language import article
from datamodules.toyland.pretrained.data import LABELS, LOOKS, Pool, augmented, pixels
from datamodules.toyland.pretrained.training import fit
from datamodules.toyland.scene import SIZE

TEMPERATURE = 0.1
JUDGED_SIZE = 3 * SIZE
PATTERN = list(LABELS).index("pattern")
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
    """uint8 → CLIP's normalized input."""
    return (images.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def train_clip(
    pool: Pool,
    tokenizer: CLIPTokenizer,
    checkpoint: Path,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    clip: CLIPModel | None = None,
) -> CLIPModel:
    """Train CLIP with InfoNCE in both directions; all captions of a batch that are true of an image are positives.

    One batch in four consists of scenes, whose captions differ mostly in the place. So that CLIP does not learn only
    places, the other batches consist of crops of subjects: half of them of three kinds with their looks, which differ
    in colours and patterns; the other half of all kinds, with half of the captions naming only the kind. Linear heads,
    dropped afterwards, classify the looks from the features of images and texts.

    Args:
        clip: continue training this model on patterns: a crop is also classified by captions that differ only in the
            word of the pattern, and the pattern is also classified from all states of the text, which a U-Net reads.
    """
    torch.manual_seed(seed)
    patterns = clip is not None
    clip = build_clip(tokenizer) if clip is None else clip.train()
    groups = [len(names) for names in list(LABELS.values())[:LOOKS]]
    image_head = nn.Linear(2 * clip.config.vision_config.hidden_size, sum(groups))
    text_head = nn.Linear(clip.config.text_config.hidden_size, sum(groups))
    draws = torch.Generator().manual_seed(seed)

    def encoded(texts: list[str]) -> Tensor:
        ids = tokenizer(texts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length).input_ids
        return torch.tensor(ids)

    scenes, with_looks = encoded(pool.captions), encoded(pool.told)
    only_kind = encoded([article(kind) for kind in LABELS["kind"]])
    looks = pool.labels[:, :LOOKS]
    words = [word for word in PATTERNS.values() if word]
    pattern_ids = looks[:, PATTERN] - 1  # -1: plain, which captions do not mention
    usable = (pattern_ids >= 0) | (not patterns)
    of_kind = [torch.nonzero((looks[:, 0] == kind) & usable)[:, 0] for kind in range(groups[0])]
    weights = [3 if patterns and name == "pattern" else 1 for name in list(LABELS)[:LOOKS]]

    def looks_loss(logits: Tensor, rows: Tensor) -> Tensor:
        parts = zip(weights, logits.split(groups, dim=-1), strict=True)
        return sum(weight * F.cross_entropy(part, looks[rows, i]) for i, (weight, part) in enumerate(parts)) / LOOKS

    def pattern_loss(image_features: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of classifying the pattern by captions that differ only in its word."""
        target = pattern_ids[rows]
        lines = [
            pool.told[row].replace(words[pattern], word)
            for row, pattern in zip(rows.tolist(), target.tolist(), strict=True)
            for word in words
        ]
        ids = encoded(lines)
        ids = ids[:, : int((ids == tokenizer.eos_token_id).int().argmax(-1).max()) + 1]
        features = F.normalize(clip.text_projection(clip.text_model(input_ids=ids).pooler_output), dim=-1)
        logits = torch.einsum("nd,npd->np", image_features, features.view(len(rows), len(words), -1))
        logits = logits * clip.logit_scale.exp().clamp(max=100)
        return F.cross_entropy(logits, target), (logits.argmax(-1) == target).float().mean()

    def loss(step: int):
        if step % 4 == 0:
            rows = torch.randint(len(pool), (batch_size,), generator=draws)
            images, ids = pool.images[rows], scenes[rows]
            match = (ids[:, None] == ids[None]).all(-1)
        else:
            if step % 2:
                few = torch.randperm(len(of_kind), generator=draws)[:3]
                choice = torch.cat([of_kind[kind] for kind in few])
                rows = choice[torch.randint(len(choice), (batch_size,), generator=draws)]
                describe = torch.ones(batch_size, dtype=torch.bool)
            else:
                rows = torch.randint(len(pool), (batch_size,), generator=draws)
                describe = torch.rand(batch_size, generator=draws) < 0.5
            images = pool.crops[rows, torch.randint(2, (batch_size,), generator=draws)]
            ids = torch.where(describe[:, None], with_looks[rows], only_kind[looks[rows, 0]])
            # A caption without looks is true of all images of its kind, one with looks of images with these looks.
            same_kind = looks[rows, 0][:, None] == looks[rows, 0][None]
            match = same_kind & (~describe | (ids[:, None] == ids[None]).all(-1))
            match |= torch.eye(batch_size, dtype=torch.bool)
        ids = ids[:, : int((ids == tokenizer.eos_token_id).int().argmax(-1).max()) + 1]
        vision = clip.vision_model(pixel_values=normalized(augmented(images, draws)))
        text = clip.text_model(input_ids=ids)
        image_features = F.normalize(clip.visual_projection(vision.pooler_output), dim=-1)
        text_features = F.normalize(clip.text_projection(text.pooler_output), dim=-1)
        logits = clip.logit_scale.exp().clamp(max=100) * image_features @ text_features.T
        # match[i, j]: caption j is true of image i. Targets are divided equally among all true ones.
        positives = match.float()
        value = (
            F.cross_entropy(logits, positives / positives.sum(1, keepdim=True))
            + F.cross_entropy(logits.T, (positives / positives.sum(0)).T)
        ) / 2
        hit = match[torch.arange(batch_size), logits.argmax(-1)].float().mean().item()
        figures = {"scenes" if step % 4 == 0 else "few kinds" if step % 2 else "all kinds": hit}
        if step % 4:
            tokens = torch.cat([vision.pooler_output, vision.last_hidden_state[:, 1:].mean(1)], dim=-1)
            value = value + looks_loss(image_head(tokens), rows)
            if step % 2:
                value = value + 0.3 * looks_loss(text_head(text.pooler_output), rows)
            if step % 2 and patterns:
                loss_of_patterns, accuracy = pattern_loss(image_features, rows)
                value = value + loss_of_patterns + looks_loss(text_head(text.last_hidden_state.mean(1)), rows)
                figures["pattern"] = accuracy.item()
        return value, figures

    fit(checkpoint, [clip, image_head, text_head], loss, draws, steps=steps, lr=lr, weight_decay=0.05, average=0.999)
    return clip


def train_dino(pairs: Tensor, checkpoint: Path, *, steps: int, batch_size: int, lr: float, seed: int) -> ViTModel:
    """Train a ViT so that two images of a subject, in different places and poses, have the nearest features of a batch.

    DINO itself uses self-distillation over crops; a contrastive loss on the same CLS output trains in minutes. As in
    DINO, there are no class labels, so that the features also distinguish subjects of the same kind.
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
        both = augmented(pairs[rows].flatten(0, 1), draws, shift=0)
        features = vit(pixel_values=pixels(both)).last_hidden_state[:, 0]
        features = F.normalize(features, dim=-1).view(batch_size, 2, -1)
        logits = features[:, 0] @ features[:, 1].T / TEMPERATURE
        target = torch.arange(batch_size)
        hit = (logits.argmax(-1) == target).float().mean()
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2, {"top-1": hit.item()}

    fit(checkpoint, [vit], loss, draws, steps=steps, lr=lr, weight_decay=0.05, average=0.99)
    return vit


def train_judge(
    pool: Pool, pairs: Tensor, checkpoint: Path, *, steps: int, batch_size: int, lr: float, seed: int
) -> ResNetForImageClassification:
    """Train a small ResNet that classifies labels, estimates colours and distinguishes individuals from one feature.

    A quarter of a batch are scenes of one subject, a quarter crops of subjects, and half are pairs of images of a
    subject, with a contrastive loss. The feature is also used for FID.
    """
    torch.manual_seed(seed)
    groups = [len(names) for names in LABELS.values()]
    config = ResNetConfig(
        embedding_size=24,
        hidden_sizes=[24, 48, 96, 128],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        num_labels=sum(groups),
        id2label=dict(enumerate(f"{group}: {name or 'none'}" for group, names in LABELS.items() for name in names)),
    )
    network = ResNetForImageClassification(config)
    # Dropped afterwards; makes the feature represent colours.
    tints = nn.Linear(config.hidden_sizes[-1], pool.tints.shape[1])
    draws = torch.Generator().manual_seed(seed)
    alone = torch.nonzero(pool.subjects == 1)[:, 0]
    quarter = batch_size // 4
    of_scene = [name in ("setting", "light", "style") for name in LABELS]

    def loss(step: int):
        scenes = alone[torch.randint(len(alone), (quarter,), generator=draws)]
        cut = torch.randint(len(pool), (quarter,), generator=draws)
        two = pairs[torch.randint(len(pairs), (quarter,), generator=draws)]
        crops = pool.crops[cut, torch.randint(2, (quarter,), generator=draws)]
        images = augmented(torch.cat([pool.images[scenes], crops, two[:, 0], two[:, 1]]), draws)
        feature = network.resnet(judged(images)).pooler_output.flatten(1)
        named, rows = feature[: 2 * quarter], torch.cat([scenes, cut])
        logits = network.classifier(named).split(groups, dim=-1)
        value = 5 * F.l1_loss(tints(named), pool.tints[rows])
        for number, part in enumerate(logits):  # labels of the scene cannot be seen in crops
            count = quarter if of_scene[number] else 2 * quarter
            weight = 3 if number == PATTERN else 1
            value = value + weight * F.cross_entropy(part[:count], pool.labels[rows[:count], number])
        first, second = F.normalize(feature[2 * quarter :], dim=-1).chunk(2)
        cosines, target = first @ second.T / TEMPERATURE, torch.arange(quarter)
        value = value + F.cross_entropy(cosines, target) + F.cross_entropy(cosines.T, target)
        hits = [(part[:quarter].argmax(-1) == pool.labels[scenes, i]).float().mean() for i, part in enumerate(logits)]
        figures = {name: hit.item() for name, hit in zip(LABELS, hits, strict=True) if name in ("kind", "pattern")}
        return value, figures | {"identity": (cosines.argmax(-1) == target).float().mean().item()}

    fit(checkpoint, [network, tints], loss, draws, steps=steps, lr=lr, average=0.998)
    # Recompute the statistics of batch normalization for the averaged weights.
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    network.train()
    with torch.no_grad():
        for start in range(0, 40 * batch_size, batch_size):
            rows = alone[start : start + batch_size // 2]
            network(judged(torch.cat([pool.images[rows], pool.crops[rows, start // batch_size % 2]])))
    return network.eval()


def judged(images: Tensor) -> Tensor:
    """uint8 → the enlarged input of the judge, whose first layers reduce the side to a quarter; patterns are fine."""
    return F.interpolate(pixels(images), size=JUDGED_SIZE, mode="bilinear")
