"""The networks that look at images for the metrics: CLIP, DINO and the judge of transformers, and the feature networks
of FID.

Shapes: `N` images or texts, `F` features, `L` logits, `S` pixels.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import (
    CLIPImageProcessorPil,
    ResNetForImageClassification,
    ResNetModel,
)

from evaluation.inception import InceptionV3
from evaluation.processes import Encode, Remembered, Sharing
from evaluation.protocols.benchmark import EvaluationError, read_image
from evaluation.protocols.protocol import Encoder, FeatureNetwork, Preprocessing, Resize
from evaluation.scores.detection import ObjectDetector
from evaluation.scores.judge import Judge
from evaluation.scores.leakage import thumbnails
from evaluation.scores.vision_judge import kept_answers, load_judge
from kosmosg.looking import CLIPEncoder, DinoEncoder, Preprocess, own_preprocessing
from kosmosg.models.storage import load_network


class ImageEncoder:
    """A ResNet of transformers in float32, which sees images as the protocol states.

    Raises:
        ValueError: weights that would have stayed random.
    """

    kind: Any

    def __init__(self, stated: Encoder, folder: Path, device: torch.device):
        self.model: Any = load_network(self.kind, folder, dtype=torch.float32).eval().requires_grad_(False).to(device)
        self.preprocess, self.device = preprocessing(stated.preprocessing, folder), device

    @torch.inference_mode()
    def images(self, images: list[Image.Image]) -> Tensor:
        """N images → N×F."""
        return self.features(self.preprocess(images).to(self.device)).cpu()

    def features(self, pixels: Tensor) -> Tensor:
        """N×3×S×S → N×F."""
        raise NotImplementedError


class ResNetFeatures(ImageEncoder):
    """Globally averaged features of a ResNet classifier: FID's network where Inception's 299 px make no sense."""

    kind = ResNetModel

    def features(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).pooler_output.flatten(1)


class JudgeEncoder(ImageEncoder):
    """Logits, then globally averaged features, of a classifier whose `id2label` reads `group: name`: N×(L+F)."""

    kind = ResNetForImageClassification

    def __init__(self, stated: Encoder, folder: Path, device: torch.device):
        super().__init__(stated, folder, device)
        names = [self.model.config.id2label[number] for number in range(self.model.config.num_labels)]
        self.labels = tuple((group, name) for group, _, name in (label.partition(": ") for label in names))
        if nameless := [label for label, (_, name) in zip(names, self.labels, strict=True) if not name]:
            raise EvaluationError(
                f"'{folder}' is no judge: its id2label has {nameless[0]!r}, where 'group: name' is expected."
            )

    def features(self, pixels: Tensor) -> Tensor:
        found = self.model.resnet(pixels).pooler_output
        return torch.cat([self.model.classifier(found), found.flatten(1)], dim=1)


class InceptionFeatures:
    """The 2048 features of FID's Inception-v3, fed the bytes of images of any size."""

    def __init__(self, encoder: FeatureNetwork, file: Path, device: torch.device):
        self.model = InceptionV3(file).to(device)
        self.device = device

    @torch.inference_mode()
    def images(self, images: list[Image.Image]) -> Tensor:
        """N images → N×2048; images of one size are looked at together."""
        features = torch.empty(len(images), 2048)
        for size in {image.size for image in images}:
            rows = [row for row, image in enumerate(images) if image.size == size]
            pixels = torch.from_numpy(np.stack([np.asarray(images[row]) for row in rows])).permute(0, 3, 1, 2)
            features[rows] = self.model(pixels.to(self.device))["2048"].cpu()
        return features


def preprocessing(stated: Preprocessing | None, folder: Path) -> Preprocess:
    """PIL images → N×3×S×S, as the protocol states, or as the encoder's folder does."""
    if stated is None:
        try:
            return own_preprocessing(folder)
        except ValueError as error:
            raise EvaluationError(f"'{folder}' has no preprocessing that can be used: {error}") from error
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": stated.resize},
        crop_size={"height": stated.crop, "width": stated.crop},
        resample=Image.Resampling[stated.interpolation.upper()],
        image_mean=stated.mean,
        image_std=stated.std,
    )
    return lambda images: processor(images, return_tensors="pt")["pixel_values"]


def load_networks(
    benchmark: str,
    protocol: Any,
    path_of: Callable[[Encoder], Path],
    device: torch.device,
    sharing: Sharing,
    answers: Path,
) -> dict[str, Any]:
    """What metrics ask, by name: functions from files or texts to features, judges, a detector. Those that the protocol
    names; `pixels` needs no weights.

    Args:
        path_of: where the weights of an encoder lie.
        answers: the folder that keeps what a vision-language judge answers.

    Raises:
        FileNotFoundError, ValueError: weights that are missing or of another network.
    """
    read = partial(read_image, upright=protocol.upright)

    def stated(name: str) -> Any:
        return getattr(protocol, name, None)

    def remembered(name: str, encode: Encode, read: Callable[[Any], Any] = read) -> Remembered:
        return Remembered(f"{benchmark}.{name}", encode, sharing, read)

    found: dict[str, Any] = {"pixels": remembered("pixels", thumbnails)}
    if encoder := stated("clip"):
        clip = CLIPEncoder(folder := path_of(encoder), device, preprocessing(encoder.preprocessing, folder))
        found["clip_images"] = remembered("images", clip.images)
        found["clip_texts"] = remembered("texts", clip.texts, str)
    if encoder := stated("dino"):
        dino = DinoEncoder(folder := path_of(encoder), device, preprocessing(encoder.preprocessing, folder))
        found["dino"] = remembered("dino", dino.images)
    if encoder := stated("judge"):
        judge = JudgeEncoder(encoder, path_of(encoder), device)
        found["judge"] = Judge(remembered("judge", judge.images), judge.labels)
    if encoder := stated("vlm"):
        ask = kept_answers(load_judge(encoder, path_of(encoder), device), answers, read)
        found["vlm"] = remembered("vlm", ask, lambda question: question).answers
    if encoder := stated("detector"):
        detector = ObjectDetector(encoder, path_of(encoder), device)
        found["detector"], found["detector_names"] = remembered("detector", detector.images).answers, detector.names
    if encoder := stated("fid"):
        network = InceptionFeatures if encoder.network == "inception" else ResNetFeatures
        images = network(encoder, path_of(encoder), device).images
        for side, size in (("fid_real", protocol.real_resize), ("fid_generated", protocol.generated_resize)):
            found[side] = remembered(side, images, lambda file, size=size: resize(read(file), size))
    return found


def resize(image: Image.Image, stated: Resize | None) -> Image.Image:
    """Shorter side to `stated.size`, then the centre crop of that side; None: the image as it is.

    Sizes are torchvision's, which the field's scripts use: the longer side is cut off to whole pixels, the crop's
    corner rounded to the nearest pixel, halves to even.
    """
    if stated is None:
        return image
    width, height = image.size
    short = min(width, height)
    width, height = int(stated.size * width / short), int(stated.size * height / short)
    resized = (by_pil if stated.library == "pil" else by_tensor)(image, width, height, stated)
    left, top = round((width - stated.size) / 2), round((height - stated.size) / 2)
    return resized.crop((left, top, left + stated.size, top + stated.size))


def by_pil(image: Image.Image, width: int, height: int, stated: Resize) -> Image.Image:
    return image.resize((width, height), Image.Resampling[stated.interpolation.upper()])


def by_tensor(image: Image.Image, width: int, height: int, stated: Resize) -> Image.Image:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    pixels = interpolate(
        pixels[None], (height, width), mode=stated.interpolation, align_corners=False, antialias=stated.antialias
    )
    # Clamped because bicubic weights overshoot.
    return truncated(pixels[0].clamp(0, 1).permute(1, 2, 0).numpy())


def truncated(pixels: np.ndarray) -> Image.Image:
    """H×W×3 in [0, 1] → bytes as torchmetrics makes them with normalize=True: 255·x, not rounded."""
    return Image.fromarray((pixels * 255).astype(np.uint8))
