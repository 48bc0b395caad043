"""Load the networks of the metrics, and preprocess images for them.

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
from transformers import CLIPImageProcessorPil, ResNetForImageClassification, ResNetModel

from evaluation.inception import InceptionV3
from evaluation.processes import Batching, Cached, Encode
from evaluation.protocols.benchmark import EvaluationError, read_image
from evaluation.protocols.protocol import Encoder, FeatureNetwork, Preprocessing, Resize
from evaluation.scores.detection import ObjectDetector
from evaluation.scores.judge import Judge
from evaluation.scores.leakage import thumbnails
from evaluation.scores.vision_judge import cached_answers, load_judge
from kosmosg.looking import CLIPEncoder, DinoEncoder, Preprocess, own_preprocessing
from kosmosg.models.storage import load_network


class ResNetFeatures:
    """Globally averaged features of a ResNet in float32: FID's network for images too small for Inception's 299 px.

    Raises:
        ValueError: the weights are of another network.
    """

    kind: Any = ResNetModel

    def __init__(self, settings: Encoder, folder: Path, device: torch.device):
        self.model: Any = load_network(self.kind, folder, dtype=torch.float32).eval().requires_grad_(False).to(device)
        self.preprocess, self.device = preprocessing(settings.preprocessing, folder), device

    @torch.inference_mode()
    def images(self, images: list[Image.Image]) -> Tensor:
        """N images → N×F."""
        return self.features(self.preprocess(images).to(self.device)).cpu()

    def features(self, pixels: Tensor) -> Tensor:
        """N×3×S×S → N×F."""
        return self.model(pixels).pooler_output.flatten(1)


class JudgeEncoder(ResNetFeatures):
    """Logits and globally averaged features, N×(L+F), of a classifier whose `id2label` has `group: name`."""

    kind = ResNetForImageClassification

    def __init__(self, settings: Encoder, folder: Path, device: torch.device):
        super().__init__(settings, folder, device)
        names = [self.model.config.id2label[number] for number in range(self.model.config.num_labels)]
        self.labels = tuple((group, name) for group, _, name in (label.partition(": ") for label in names))
        if nameless := [label for label, (_, name) in zip(names, self.labels, strict=True) if not name]:
            raise EvaluationError(
                f"'{folder}' is not a judge: its id2label has {nameless[0]!r} instead of 'group: name'."
            )

    def features(self, pixels: Tensor) -> Tensor:
        pooled = self.model.resnet(pixels).pooler_output
        return torch.cat([self.model.classifier(pooled), pooled.flatten(1)], dim=1)


class InceptionFeatures:
    """The 2048 features of FID's Inception-v3, for images of any size."""

    def __init__(self, encoder: FeatureNetwork, file: Path, device: torch.device):
        self.model, self.device = InceptionV3(file).to(device), device

    @torch.inference_mode()
    def images(self, images: list[Image.Image]) -> Tensor:
        """N images → N×2048; images of the same size form a batch."""
        features = torch.empty(len(images), 2048)
        for size in {image.size for image in images}:
            rows = [row for row, image in enumerate(images) if image.size == size]
            pixels = torch.from_numpy(np.stack([np.asarray(images[row]) for row in rows])).permute(0, 3, 1, 2)
            features[rows] = self.model(pixels.to(self.device))["2048"].cpu()
        return features


def preprocessing(settings: Preprocessing | None, folder: Path) -> Preprocess:
    """Return a function PIL images → N×3×S×S, as set by the protocol or else by the encoder's folder."""
    if settings is None:
        try:
            return own_preprocessing(folder)
        except ValueError as error:
            raise EvaluationError(f"'{folder}' has no usable preprocessing: {error}") from error
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": settings.resize},
        crop_size={"height": settings.crop, "width": settings.crop},
        resample=Image.Resampling[settings.interpolation.upper()],
        image_mean=settings.mean,
        image_std=settings.std,
    )
    return lambda images: processor(images, return_tensors="pt")["pixel_values"]


def load_networks(
    benchmark: str,
    protocol: Any,
    path_of: Callable[[Encoder], Path],
    device: torch.device,
    batching: Batching,
    answers: Path,
) -> dict[str, Any]:
    """Load the networks that the protocol names, and `pixels`, which needs no weights.

    Args:
        path_of: returns the folder or file of an encoder's weights.
        answers: folder of cached answers of a vision-language judge.

    Returns:
        Functions from files or texts to features, a `Judge`, detections or answers, by the names in `Metric.needs`.

    Raises:
        FileNotFoundError, ValueError: weights are missing or of another network.
    """
    read = partial(read_image, upright=protocol.upright)

    def setting(name: str) -> Any:
        return getattr(protocol, name, None)

    def cached(name: str, encode: Encode, read: Callable[[Any], Any] = read) -> Cached:
        return Cached(f"{benchmark}.{name}", encode, batching, read)

    networks: dict[str, Any] = {"pixels": cached("pixels", thumbnails)}
    if encoder := setting("clip"):
        clip = CLIPEncoder(folder := path_of(encoder), device, preprocessing(encoder.preprocessing, folder))
        networks["clip_images"] = cached("images", clip.images)
        networks["clip_texts"] = cached("texts", clip.texts, str)
    if encoder := setting("dino"):
        dino = DinoEncoder(folder := path_of(encoder), device, preprocessing(encoder.preprocessing, folder))
        networks["dino"] = cached("dino", dino.images)
    if encoder := setting("judge"):
        judge = JudgeEncoder(encoder, path_of(encoder), device)
        networks["judge"] = Judge(cached("judge", judge.images), judge.labels)
    if encoder := setting("vlm"):
        ask = cached_answers(load_judge(encoder, path_of(encoder), device), answers, read)
        networks["vlm"] = cached("vlm", ask, lambda question: question).answers
    if encoder := setting("detector"):
        detector = ObjectDetector(encoder, path_of(encoder), device)
        networks["detector"], networks["detector_names"] = cached("detector", detector.images).answers, detector.names
    if encoder := setting("fid"):
        kind = InceptionFeatures if encoder.network == "inception" else ResNetFeatures
        images = kind(encoder, path_of(encoder), device).images
        for side, size in (("fid_real", protocol.real_resize), ("fid_generated", protocol.generated_resize)):
            networks[side] = cached(side, images, lambda file, size=size: resize(read(file), size))
    return networks


def resize(image: Image.Image, settings: Resize | None) -> Image.Image:
    """Resize the shorter side to `settings.size` and crop the centre; None returns the image unchanged.

    Rounding is torchvision's: the longer side is truncated to whole pixels, the corner of the crop is rounded to the
    nearest pixel, halves to even.
    """
    if settings is None:
        return image
    width, height = image.size
    short = min(width, height)
    width, height = int(settings.size * width / short), int(settings.size * height / short)
    resized = (resize_pil if settings.library == "pil" else resize_tensor)(image, width, height, settings)
    left, top = round((width - settings.size) / 2), round((height - settings.size) / 2)
    return resized.crop((left, top, left + settings.size, top + settings.size))


def resize_pil(image: Image.Image, width: int, height: int, settings: Resize) -> Image.Image:
    return image.resize((width, height), Image.Resampling[settings.interpolation.upper()])


def resize_tensor(image: Image.Image, width: int, height: int, settings: Resize) -> Image.Image:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    pixels = interpolate(
        pixels[None], (height, width), mode=settings.interpolation, align_corners=False, antialias=settings.antialias
    )
    # Bicubic interpolation overshoots.
    return truncated(pixels[0].clamp(0, 1).permute(1, 2, 0).numpy())


def truncated(pixels: np.ndarray) -> Image.Image:
    """Convert H×W×3 in [0, 1] to an image of bytes 255·x, truncated as torchmetrics does with normalize=True."""
    return Image.fromarray((pixels * 255).astype(np.uint8))
